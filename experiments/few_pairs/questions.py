"""The four questions: few pairs with much unpaired data, words already said, wrong captions, and the weight of the generative term."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from experiments.few_pairs.learning import (
    SPACE,
    Material,
    World,
    build,
    differences,
    first_captions,
    fit,
    mean_of_images,
    measure_everywhere,
    overall_quality,
    tries,
)
from experiments.few_pairs.systems import RBM, Detector, HiddenLayer, System
from training.lib.checkpoints import whole_file
from training.lib.rbm_evaluation import log_likelihood


HYBRID_WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SAID = ("rbm", "linear", "linear, said", "mlp, said")
JUDGES = ("rbm", "rbm, unpaired", "linear", "mlp")
REFERENCES = 500  # images that a caption is held against


def subset(material: Material, count: int, seed: int) -> np.ndarray:
    """`count` random training rows; those of a smaller count are among those of a larger one."""
    return np.random.default_rng(seed).permutation(material.rows)[:count]


def kept(file: Path, compute):
    """What `compute` gives, kept as arrays in `file` (.npz): a stopped run goes on from there."""
    if not file.exists():
        found = compute()
        with whole_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **found)
    return dict(np.load(file))


def trained(name: str, material: Material, rows, setting: dict, steps: int, seed: int, activity=None, words=None):
    """A system trained on these rows, and its quality on held-back images."""
    known = {key: value for key, value in setting.items() if "width" not in key}
    settings = replace(material.settings, seed=seed, hidden_size=material.equal_hidden_size(), **known)
    torch.manual_seed(seed)
    system = build(name, material, rows, settings, setting, activity)
    quality = overall_quality(material.held_back)
    return system, fit(system, material.store, words or material.words, rows, quality, steps)


def activity_of(file: Path) -> dict:
    found = np.load(file)
    return {"mean": float(found["activity_mean"]), "input_std": float(found["activity_input_std"])}


def one_run(name: str, material: Material, rows, setting, steps: int, seed: int, activity) -> dict[str, np.ndarray]:
    """Train and measure: the arrays of `measure_everywhere`, the quality, and the number of trained parameters."""
    system, quality = trained(name, material, rows, setting, steps, seed, activity)
    found = measure_everywhere(system, material) | {"quality": np.array(quality)}
    if isinstance(system, RBM):
        found |= {f"activity_{key}": np.array(value) for key, value in system.activity(material.images).items()}
    return found | {"parameters": np.array(sum(p.numel() for p in system.parameters()))}


def chosen_setting(name: str, material: Material, count: int, args, work: Path) -> tuple[dict, float]:
    """The best of `args.tries` settings of a system with `count` pairs, and its quality: the first seed decides."""
    found = []
    for number, setting in enumerate(tries(name, args.tries)):
        file = work / "pairs" / f"{name}-{count}-try{number}.npz".replace(" ", "")
        rows, activity = subset(material, count, 0), matched(work, name, count)
        run = partial(one_run, name, material, rows, setting, args.steps, 0, activity)
        found.append((float(kept(file, run)["quality"]), number, setting, file))
    quality, number, setting, file = max(found, key=lambda each: each[0])
    best = work / "pairs" / f"{name}-{count}-0.npz".replace(" ", "")
    best.write_bytes(file.read_bytes())
    return setting, quality


def matched(work: Path, name: str, count: int):
    """The activity that the random RBM takes over: that of the RBM of as many pairs."""
    return activity_of(work / "pairs" / f"rbm-{count}-0.npz") if name == "random rbm" else None


def few_pairs(material: Material, args, work: Path) -> dict:
    """Learning from few pairs and much unpaired data: measures of every system at every number of pairs."""
    runs, results = {}, {"chosen": {}, "means": {}, "differences": {}}
    for count in sorted({min(count, len(material.rows)) for count in args.pairs}):
        for name in (each for each in SPACE if each in args.systems):
            setting, quality = chosen_setting(name, material, count, args, work)
            results["chosen"].setdefault(str(count), {})[name] = setting | {"quality": quality}
            of_seeds = []
            for seed in range(args.seeds):
                file = work / "pairs" / f"{name}-{count}-{seed}.npz".replace(" ", "")
                rows, activity = subset(material, count, seed), matched(work, name, count)
                run = partial(one_run, name, material, rows, setting, args.steps, seed, activity)
                of_seeds.append(kept(file, run))
            runs[name] = {key: np.mean([run[key] for run in of_seeds], 0) for key in of_seeds[0]}
            spread = {key: float(np.std([run[key].mean() for run in of_seeds])) for key in of_seeds[0]}
            means = {key: float(value.mean()) for key, value in runs[name].items()}
            results["means"].setdefault(str(count), {})[name] = means | {"spread": spread}
            print(count, name, json.dumps({k: round(v, 3) for k, v in means.items()}), flush=True)
        ours = [name for name in ("rbm", "rbm, unpaired") if name in runs]
        results["differences"][str(count)] = {
            mine: {
                other: differences(images_of(runs[mine]), images_of(runs[other]), args.resamples)
                for other in runs
                if other != mine
            }
            for mine in ours
        }
    return results


def images_of(run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Measures that have a number for each image or word."""
    return {name: value for name, value in run.items() if value.ndim}


def said_system(name: str, material: Material, rows, settings) -> System:
    """A system that reads the words said, or "linear", which does not; all that do have as many weights as the linear map of [x; said]."""
    V, K = material.sizes
    common = (material.mean, material.std, settings, material.words.share(rows))
    if name == "rbm":
        return RBM(*common)
    if name == "mlp, said":
        return Detector(*common, HiddenLayer(V + K, settings.hidden_size), settings.hidden_size, reads_said=True)
    return Detector(*common, torch.nn.Identity(), V + K if "said" in name else V, reads_said="said" in name)


def said_hidden_size(name: str, material: Material) -> int:
    """H: (V + K) H weights of an RBM, and (V + 2 K) H of an MLP, are the (V + K) K of a linear map."""
    V, K = material.sizes
    return max(2, round((V + K) * K / (V + 2 * K)) if name == "mlp, said" else K)


def half_said(world: World, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words w (m, K) of all captions, a random half of each caption's words (m, K), and the image of each (m,)."""
    w = torch.cat([of_image.float() for of_image in world.words])
    owner = torch.tensor([i for i, of_image in enumerate(world.words) for _ in of_image])
    order = (torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) + 2 * (1 - w)).argsort(1)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(w.shape[1]).expand_as(order))
    return w, w * (place < w.sum(1, keepdim=True) // 2), owner


@torch.no_grad()
def rest_likelihood(system: System, world: World, told: bool = True, exact: bool = True) -> np.ndarray:
    """(n,) log-likelihood of the words of a caption that were not said, nats a caption, mean over an image's captions.

    The words not said are taken as independent given image and said words, for all systems; it is a distribution over them.

    Args:
        told: whether the system is told the said words. exact: the RBM's conditional of each word as it is, else to second order, for speed.
    """
    w, said, owner = half_said(world)
    x, parts = system.standardise(world.features), []
    for some in torch.arange(len(w)).split(512):
        logits = system.word_logits(x[owner[some]], said[some] if told else None, exact)
        terms = F.binary_cross_entropy_with_logits(logits, w[some], reduction="none") * (1 - said[some])
        parts.append(-terms.sum(-1))
    return mean_of_images(torch.cat(parts), owner).double().numpy()


def words_said(material: Material, args, work: Path) -> dict:
    """Words given the image and some words already said."""
    held, results = first_captions(material.held_back), {"means": {}, "differences": {}, "parameters": {}, "chosen": {}}
    quality = lambda system: float(rest_likelihood(system, held, exact=False).mean())
    for count in sorted({min(count, len(material.rows)) for count in args.said_pairs}):
        runs = {}
        for name in SAID:
            file = work / "said" / f"{name}-{count}.npz".replace(" ", "")
            runs[name] = kept(file, partial(said_run, name, material, count, args, quality))
        found = {name: run["told"] for name, run in runs.items()} | {"rbm, told nothing": runs["rbm"]["untold"]}
        results["means"][str(count)] = {name: float(value.mean()) for name, value in found.items()}
        results["parameters"][str(count)] = {name: int(run["parameters"]) for name, run in runs.items()}
        results["chosen"][str(count)] = {name: json.loads(str(run["setting"])) for name, run in runs.items()}
        others = {name: {"log_likelihood": value} for name, value in found.items()}
        results["differences"][str(count)] = {
            other: differences(others["rbm"], others[other], args.resamples)["log_likelihood"]
            for other in others
            if other != "rbm"
        }
        print(count, json.dumps(results["means"][str(count)]), flush=True)
    return results


def said_run(name: str, material: Material, count: int, args, quality) -> dict[str, np.ndarray]:
    """The best of `args.tries` settings, measured on the worlds over all `args.seeds` seeds."""
    base = "rbm" if name == "rbm" else "linear"  # the space of tries

    def run(setting, seed):
        settings = replace(
            material.settings, match=0.0, seed=seed, hidden_size=said_hidden_size(name, material), **setting
        )
        torch.manual_seed(seed)
        rows = subset(material, count, seed)
        system = said_system(name, material, rows, settings)
        return system, fit(system, material.store, material.words, rows, quality, args.steps)

    first = [run(setting, 0) for setting in tries(base, args.tries)]
    best = max(range(len(first)), key=lambda number: first[number][1])
    setting = tries(base, args.tries)[best]
    systems = [first[best][0]] + [run(setting, seed)[0] for seed in range(1, args.seeds)]
    over = lambda told: np.mean(
        [np.concatenate([rest_likelihood(s, world, told) for world in material.worlds.values()]) for s in systems], 0
    )
    untold = {"untold": over(False)} if name == "rbm" else {}
    parameters = sum(p.numel() for p in systems[0].parameters())
    return {"told": over(True), "parameters": np.array(parameters), "setting": np.array(json.dumps(setting))} | untold


def auc_interval(wrong: np.ndarray, evidence: dict[str, np.ndarray], ours: str, resamples: int, seed: int = 0):
    """AUC of finding the wrong captions by little evidence, with 95 % percentile intervals over captions; and how far `ours` is above the
    others.

    Args:
        wrong (m,) bool. evidence: of each system (m,).
    """
    rng, names = np.random.default_rng(seed), list(evidence)
    auc = lambda name, some: roc_auc_score(wrong[some], -evidence[name][some])
    draws = []
    while len(draws) < resamples:
        some = rng.integers(len(wrong), size=len(wrong))
        if wrong[some].any() and not wrong[some].all():
            draws.append([auc(name, some) for name in names])
    draws, everything = np.array(draws), np.arange(len(wrong))
    observed = np.array([auc(name, everything) for name in names])
    interval = lambda value, values: dict(zip(("low", "high"), map(float, np.percentile(values, [2.5, 97.5])))) | value
    mine = names.index(ours)
    return {
        "auc": {name: interval({"auc": float(observed[i])}, draws[:, i]) for i, name in enumerate(names)},
        "differences": {
            name: interval({"difference": float(observed[mine] - observed[i])}, draws[:, mine] - draws[:, i])
            for i, name in enumerate(names)
            if i != mine
        },
    }


@torch.no_grad()
def evidence_for_captions(system: System, material: Material, words, rows) -> list[np.ndarray]:
    """Of each row's captions PMI less the log of its mean exponential over held-back images, as `training/capfilt.py` judges."""
    others = system.standardise(material.held_back.features[:REFERENCES])
    result = []
    for row in rows:
        w = words[row].float()
        x = system.standardise(material.store.batch([row]))
        usual = system.information(others, w).logsumexp(0) - np.log(len(others))
        result.append((system.information(x, w)[0] - usual).double().numpy())
    return result


def cross_fitted(name: str, material: Material, words, folds: np.ndarray, rows, setting, args) -> dict[str, np.ndarray]:
    """`evidence` for the captions of `rows`, one after the other, by systems that were trained without the fold of their image.

    Args:
        words: `CaptionWords` of the captions as they are trained on and judged. folds (n,): of all rows of the store.
    """
    found = {}
    for fold in np.unique(folds):
        judged = [int(row) for row in rows if folds[row] == fold]
        if judged:
            seen = material.rows[folds[material.rows] != fold]
            system, _ = trained(name, material, seen, setting, args.steps, 0, words=words)
            found |= dict(zip(judged, evidence_for_captions(system, material, words, judged)))
    return {"evidence": np.concatenate([found[int(row)] for row in rows])}


def wrong_captions(material: Material, args, work: Path, noisy, settings: dict) -> dict:
    """Finding captions that were exchanged, by data set, and captions of the web that a judge by eye found wrong.

    Args:
        noisy: `NoisyPairs`. settings: of each system, chosen in `few_pairs` with all pairs.
    """
    names, results = [name for name in JUDGES if name in settings], {}
    exchanged, natural = {}, {}
    judged = np.array(sorted(noisy.labels))
    for name in names:
        setting = {key: value for key, value in settings[name].items() if key != "quality"}
        judge = partial(cross_fitted, name, material, folds=noisy.folds, setting=setting, args=args)
        for found, kind, words, rows in (
            (exchanged, "exchanged", noisy.words, material.rows),
            (natural, "natural", material.words, judged),
        ):
            if len(rows):
                file = work / "noisy" / f"{name}-{kind}.npz".replace(" ", "")
                found[name] = kept(file, partial(judge, words=words, rows=rows))["evidence"]
    wrong = np.concatenate([noisy.wrong[row] for row in material.rows])
    part = np.concatenate([np.full(len(noisy.wrong[row]), noisy.part[row]) for row in material.rows])
    for number, title in enumerate(noisy.titles):
        here = part == number
        results[f"exchanged, {title}"] = auc_interval(
            wrong[here], {n: e[here] for n, e in exchanged.items()}, "rbm", args.resamples
        )
    if len(judged):
        labels = np.array([noisy.labels[row] for row in judged])
        results["labels"] = {label: int((labels == label).sum()) for label in ("right", "partly", "wrong")}
        results["web as it is: not right"] = auc_interval(labels != "right", natural, "rbm", args.resamples)
        if (labels == "wrong").any():
            clear = labels != "partly"
            evidence = {name: of[clear] for name, of in natural.items()}
            results["web as it is: wrong, against right"] = auc_interval(
                labels[clear] == "wrong", evidence, "rbm", args.resamples
            )
    return results


def hybrid(material: Material, args, work: Path, settings: dict) -> dict:
    """The curve over the weight of the generative term: of the pairs alone, and with images and texts that are no pairs.

    Args:
        settings: of "rbm, unpaired" by number of pairs, chosen in `few_pairs`; all but the weight is taken from them.
    """
    results = {}
    for count in sorted({min(count, len(material.rows)) for count in args.hybrid_pairs}):
        setting = {key: value for key, value in settings[str(count)]["rbm, unpaired"].items() if key != "quality"}
        for name in ("rbm", "rbm, unpaired"):
            for weight in HYBRID_WEIGHTS:
                if name == "rbm, unpaired" and not weight:
                    continue  # the same as without
                file = work / "hybrid" / f"{name}-{count}-{weight}.npz".replace(" ", "")
                run = partial(hybrid_run, name, material, count, setting | {"cd": weight}, args)
                found = kept(file, run)
                entry = {key: float(value.mean()) for key, value in found.items()}
                results.setdefault(str(count), {}).setdefault(name, {})[str(weight)] = entry
                print(count, name, weight, json.dumps({k: round(v, 3) for k, v in entry.items()}), flush=True)
    return results


def hybrid_run(name: str, material: Material, count: int, setting: dict, args) -> dict[str, np.ndarray]:
    """The measures of one RBM, and log P(image, words) of held-back and of training pairs by annealed importance sampling."""
    rows = subset(material, count, 0)
    system, _ = trained(name, material, rows, setting, args.steps, 0)
    some = rows[:500]
    pairs = lambda features, words: (system.standardise(features), [of_image[:1] for of_image in words])
    held = pairs(material.held_back.features, material.held_back.words)
    seen = pairs(material.store.batch(some), [material.words[row] for row in some])
    density = log_likelihood(system.rbm, held, seen, temperatures=args.temperatures)
    return measure_everywhere(system, material) | {
        "density": np.array(density["log_likelihood"]),
        "density_training": np.array(density["log_likelihood_training"]),
    }
