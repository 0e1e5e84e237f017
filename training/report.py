"""Write the numbers of the results files into the documents, between `<!-- name -->` and `<!-- /name -->`.

    python -m training.report           # write
    python -m training.report --check   # exit 1 if a file differs from what would be written

Also copies model_card.md to the checkpoint, where the Hub reads it as README.md. Numbers in the documents are never typed: add a
function to `BLOCKS` and a pair of markers.
"""

import argparse
import json
import re
import sys
from pathlib import Path


REPO = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoints/blip-rbm-small"
BENCHMARKS = "benchmarks/results"
DOCUMENTS = (
    "README.md",
    "model_card.md",
    "training/README.md",
    "docs/results.md",
    "docs/performance.md",
    "docs/rbm.md",
    "docs/alignment.md",
    "experiments/mlp_adapter/README.md",
)
MEASURES = {"CIDEr-D": ".1f", "BLEU-4": ".1f", "ROUGE-L": ".1f", "METEOR": ".1f", "vocabulary": ".0f", "novel": ".2f"}
# Data sets on which the embedded model is measured, `benchmarks/results/captions_NAME.json`; captions_old_NAME.json, and of
# Flickr8k captions_seed_0.json: the embedded model of 0.1.0, whose captioner saw Flickr8k alone.
WORLDS = {"flickr8k": "Flickr8k", "web": "web photographs", "coco": "COCO, no image of it trained on"}
CONTROLS = "experiments/controls/controls.json"
ADAPTER = "experiments/mlp_adapter"
WORLD_MEASURES = {name: form for name, form in MEASURES.items() if name != "novel"} | {
    "CHAIR-i": ".1f",
    "CHAIR-s": ".1f",
}


def read(path: str):
    """A results file, by its path in the repository."""
    return json.loads((REPO / path).read_text())


def table(header, rows) -> str:
    """A Markdown table of cells that are strings already."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])


def measures(system: dict, forms: dict[str, str] = MEASURES) -> list[str]:
    """Cells of `forms`, empty for what was not measured."""
    return [format(system[name], form) if name in system else "" for name, form in forms.items()]


def interval(entry: dict, scale: float = 1, form: str = "+.1f") -> str:
    """A difference and its interval, `scale` times what the results file has."""
    return "{} [{}, {}]".format(*(format(scale * entry[key], form) for key in ("difference", "low", "high")))


def systems_table(results: dict, names: dict) -> str:
    """A row for each system of `names` (key in the results file -> what the table calls it), then the difference."""
    systems = results["systems"] | results["ablation"]
    rows = [[said, *measures(systems[name])] for name, said in names.items() if name in systems]
    differences = [interval(results["difference"][name]) if name in results["difference"] else "" for name in MEASURES]
    return table(
        [f"{results['images']:,} images of {results['dataset']} {results['split']}", *MEASURES],
        [*rows, ["BLIP-RBM minus BLIP [95 % interval]", *differences]],
    )


def results_block(results: dict) -> str:
    names = {
        "BLIP": "BLIP, 3 beams",
        "9 beams: first": "BLIP, 9 beams",
        "guide alone": "with guide alone",
        "9 beams: re-rank": "with re-rank alone",
        "BLIP-RBM": "**BLIP-RBM**: guide and re-rank",
    }
    return systems_table(results, names)


def settings_block(results: dict) -> str:
    settings, rbm = results["settings"], results["rbm"]
    return (
        f"{settings['num_beams']} beams, length penalty {settings['length_penalty']:g}, repetition penalty "
        f"{settings['repetition_penalty']:g}, at most {settings['max_new_tokens']} new tokens, {results['references_per_image']} references "
        f"an image, COCO tokenization. BLIP-RBM: the same weights with guide ({rbm['rbm_guidance']:g}) and re-rank of "
        f"{rbm['rbm_rerank_candidates']} beams. Novel: share of captions that are in no training image. Intervals: paired bootstrap over images."
    )


def ablation_block(results: dict) -> str:
    seconds = {name: system["seconds"] for name, system in results["systems"].items()}
    said = (
        f"Seconds for all images, vision included: BLIP {seconds['BLIP']:.0f}, BLIP-RBM {seconds['BLIP-RBM']:.0f} "
        f"({seconds['BLIP-RBM'] / seconds['BLIP']:.1f} times). The oracle looks at the references. Consensus alone is minimum Bayes risk "
        "without the RBM."
    )
    return systems_table(results, {name: name for name in results["systems"] | results["ablation"]}) + f"\n\n{said}"


def seeds_block(name: str) -> str:
    """What BLIP-RBM adds to BLIP, for RBMs trained from three seeds."""
    rows = []
    for seed in range(3):
        results = read(f"{BENCHMARKS}/captions_{name}_{seed}.json")
        blip, ours = results["systems"].values()
        cells = [interval(results["difference"][measure]) for measure in ("CIDEr-D", "BLEU-4", "ROUGE-L")]
        cells.append(f"{ours['METEOR'] - blip['METEOR']:+.1f}" if "METEOR" in ours else "")
        words = f"{ours['vocabulary'] / blip['vocabulary'] - 1:+.0%}"
        rows.append([str(seed), *cells, words, f"{100 * (ours['novel'] - blip['novel']):+.1f}"])
    return table(["seed", "CIDEr-D", "BLEU-4", "ROUGE-L", "METEOR", "vocabulary", "novel, points"], rows)


def results_of_worlds(folder: str) -> dict[tuple[str, str], dict]:
    """What was measured on each data set of `WORLDS`, by the model ("0.1.0: " or "") and the data set."""
    files = {
        (model, world): f"captions_{name}{world}" for model, name in (("0.1.0: ", "old_"), ("", "")) for world in WORLDS
    }
    files["0.1.0: ", "flickr8k"] = "captions_seed_0"
    return {
        key: read(f"{folder}/{file}.json") for key, file in files.items() if (REPO / f"{folder}/{file}.json").exists()
    }


def worlds_block(folder: str = BENCHMARKS) -> str:
    """The model before and now on each data set of `WORLDS` that was measured."""
    rows, measured = [], results_of_worlds(folder)
    for (model, world), results in sorted(measured.items(), key=lambda item: list(WORLDS).index(item[0][1])):
        where = f"{WORLDS[world]}, {results['images']:,} images of {results['split']}"
        for name, system in results["systems"].items():
            rows.append([where, f"{model}{name}", *measures(system, WORLD_MEASURES)])
        ours = results["difference"]
        apart = [interval(ours[name]) if name in ours else "" for name in WORLD_MEASURES]
        rows.append([where, f"{model}BLIP-RBM minus BLIP", *apart])
    return table(["images", "system", *WORLD_MEASURES], rows) if rows else "Not measured yet: `make evaluate`."


def worlds_cider_block(folder: str = BENCHMARKS) -> str:
    """CIDEr-D alone of each system, a column a data set of `WORLDS`."""
    rows, measured = [], results_of_worlds(folder)
    for model in dict.fromkeys(model for model, _ in measured):
        found = [measured.get((model, world)) for world in WORLDS]
        for name in ("BLIP", "BLIP-RBM"):
            cells = [format(one["systems"][name]["CIDEr-D"], ".1f") if one else "" for one in found]
            rows.append([f"{model}{name}", *cells])
        apart = [interval(one["difference"]["CIDEr-D"]) if one else "" for one in found]
        rows.append([f"{model}BLIP-RBM minus BLIP", *apart])
    return table(["CIDEr-D, 1,000 validation images each", *WORLDS.values()], rows) if rows else "Not measured yet."


def best_control(together: dict) -> str:
    """The system without an RBM that has the highest CIDEr-D."""
    return max(
        (s for s in together if s != "BLIP" and not s.startswith("RBM")),
        key=lambda s: together[s]["measures"]["CIDEr-D"],
    )


def controls_block(file: str = CONTROLS) -> str:
    """What stands in the RBM's place, CIDEr-D of each world, and what the RBM is above it on all images together."""
    worlds, rows = read(file)["worlds"], []
    for system, entry in worlds["all"].items():
        cells = [f"{worlds[world][system]['measures']['CIDEr-D']:.1f}" for world in worlds]
        apart = [interval(entry["rbm_minus_it"][measure]) for measure in ("CIDEr-D", "BLEU-4", "ROUGE-L", "CHAIR-i")]
        rows.append([system, *cells, interval(entry["minus_blip"]["CIDEr-D"]), *apart])
    named = [WORLDS.get(world, world) for world in worlds]
    header = [
        "in the RBM's place",
        *named,
        "minus BLIP",
        *(f"RBM minus it, {m}" for m in ("CIDEr-D", "BLEU-4", "ROUGE-L", "CHAIR-i")),
    ]
    return table(header, rows)


def control_block(file: str = CONTROLS) -> str:
    """The sentence of what the RBM adds to the best control."""
    together = read(file)["worlds"]["all"]
    best = best_control(together)
    ours = next(name for name in ("RBM, with guide", "RBM") if name in together)
    difference = together[best]["rbm_minus_it"]["CIDEr-D"]
    verdict = "these images do not tell them apart"
    if difference["low"] > 0 or difference["high"] < 0:
        verdict = "the RBM adds to it" if difference["low"] > 0 else "the control is better"
    return (
        f"The best control ({best}) is {interval(together[best]['minus_blip']['CIDEr-D'])} CIDEr-D above BLIP on the three kinds of photographs "
        f"together, BLIP-RBM {interval(together[ours]['minus_blip']['CIDEr-D'])}. BLIP-RBM minus the control is {interval(difference)}: {verdict}."
    )


def refine_entries() -> dict[str, dict]:
    """What was measured on held-back images of the captioner without refine, with it, and with an MLP in its place."""
    files = {
        "without": f"{CHECKPOINT}/captioner.json",
        "refine": f"{ADAPTER}/refine.json",
        "MLP": f"{ADAPTER}/mlp.json",
    }
    return {name: max(read(file)["held_back"], key=lambda entry: entry["eval_cider"]) for name, file in files.items()}


def refine_block() -> str:
    header = ["CIDEr-D, 1,000 held-back images", "Flickr8k", "web photographs", "all", "vocabulary"]
    rows = [
        [name, *(f"{entry[f'eval_cider{part}']:.1f}" for part in ("_0", "_1", "")), f"{entry['eval_vocabulary']:.0f}"]
        for name, entry in refine_entries().items()
    ]
    return table(header, rows)


def refine_sentence() -> str:
    ciders = {name: entry["eval_cider"] for name, entry in refine_entries().items()}
    return (
        f"CIDEr-D of held-back images is {ciders['refine']:.1f} with it, {ciders['without']:.1f} without, and {ciders['MLP']:.1f} with an MLP of as many "
        "parameters in its place"
    )


def diversity_block() -> str:
    diversity = read("experiments/diversity/diversity.json")
    rows = [
        [way, setting, *(f"{entry[name]:{form}}" for name, form in (("cider_mean", ".1f"), ("cider_best", ".1f"), ("div_2", ".2f"), ("mbleu_4", ".2f")))]
        for way, settings in diversity["ways"].items()
        for setting, entry in settings.items()
    ]  # fmt: skip
    settings = diversity["settings"]
    header = ["way", "setting", "CIDEr-D, mean of an image's captions", "best of them", "Div-2", "mBLEU-4"]
    said = f"{settings['captions']} captions of each of {diversity['images']} images of {settings['split']}."
    return f"{table(header, rows)}\n\n{said}"


def confidence_block() -> str:
    result = read(f"{CHECKPOINT}/confidence.json")
    confidence = result["confidence"]
    rows = [
        ["captions that are right (as near to the references as half of the human ones)", f"{confidence['share_right']:.0%}"],
        ["AUC of the confidence for it", f"{confidence['auc']:.2f}"],
        ["expected calibration error", f"{confidence['expected_calibration_error']:.3f}"],
        ["CIDEr-D of all captions", f"{confidence['cider_all']:.1f}"],
        ["without the least confident fifth", f"{confidence['cider_abstaining_at_20_percent']:.1f}"],
        ["of the most confident fifth", f"{confidence['cider_of_most_confident']['0.2']:.1f}"],
    ]  # fmt: skip
    return table([f"{result['images']:,} images of {result['split']}", ""], rows)


def auc_interval(entry: dict) -> str:
    return f"{entry['auc']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def unlike_block(unlike: dict) -> str:
    """AUC of each score for each kind of image, and the means over the kinds that are no photographs of a data set: `training.lib.outliers`."""
    scores, means = unlike["auc"], unlike["mean"]
    kinds = sorted(next(iter(scores.values())), key=lambda kind: kind in means)
    rows = [[kind, *(auc_interval(of_kinds[kind]) for of_kinds in scores.values())] for kind in kinds]
    at = len(kinds) + 1 - len(means)  # before photographs, which should not stand out
    for photographs, mean in reversed(means.items()):
        name = "**mean of the above**" if photographs == unlike["inside"] else f"**mean, against {photographs}**"
        rows.insert(at, [name, *(auc_interval(mean["auc"][score]) for score in scores)])
    images = unlike["images"]
    said = (
        f"{images['inside']:,} {unlike['inside']} against {images['of_a_kind']:,} images of each kind; the distances are from "
        f"{images['compared_to']:,} training images. Intervals: paired bootstrap over images."
    )
    return f"{table(['AUC; 0.5 as by chance', *scores], rows)}\n\n{said}"


def unlike_summary(unlike: dict) -> str:
    """What the RBM's energy is worth beside the best score that needs no RBM, against each kind of photographs."""
    ours, parts = unlike["sorted_by"], []
    (other,) = {"free energy", "relative free energy"} - {ours}
    for photographs, mean in unlike["mean"].items():
        aucs = mean["auc"]
        controls = mean["difference"].keys() - {other, "confidence"}
        best = max(sorted(controls), key=lambda score: aucs[score]["auc"])
        low, high = mean["difference"][best]["low"], mean["difference"][best]["high"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        parts.append(
            f"against {photographs} {auc_interval(aucs[ours])} ({other} {aucs[other]['auc']:.2f}) and {auc_interval(aucs[best])} "
            f"({best}: {verdict})"
        )
    kinds = len(next(iter(unlike["auc"].values()))) + 1 - len(unlike["mean"])
    said = f"Mean AUC over {kinds} kinds of unlike images (0.5 as by chance) of the {ours}, and of the best score that needs no RBM"
    return f"{said}: {'; '.join(parts)}."


def speed_block() -> str:
    """`benchmarks.generate` on each processor: times stock BLIP, seconds and memory."""
    parts = []
    for suffix in ("", "_amx"):
        files = [f"{BENCHMARKS}/generate{part}{suffix}.json" for part in ("", "_16", "_embedded")]
        speeds = [read(file) for file in files if (REPO / file).exists()]
        if speeds:
            settings = speeds[0]["settings"]
            processor = settings.get("processor", "A processor with AVX512 and without AMX")
            said = f"{processor}, {settings['threads']} threads, {settings['new_tokens']} new tokens:"
            parts += [said, speed_table([row for speed in speeds for row in speed["rows"]])]
    return "\n\n".join(parts)


def speed_table(measured: list[dict]) -> str:
    cells = {}
    for row in measured:
        contender = row["contender"].removeprefix("BLIP-RBM, ").replace("refine and guide", "guide on")
        cells.setdefault((row["model"], row["dtype"], row["batch"], row["beams"]), {})[contender] = row
    names = {"blip_base": "BLIP-base, 384 px", "embedded": "embedded model"}
    shown = [
        name for name in ("RBM off", "guide on", "RBM off, 8 bits") if any(name in cell for cell in cells.values())
    ]
    rows = []
    for (model, dtype, batch, beams), cell in cells.items():
        stock, off = next(iter(cell.values())), cell["RBM off"]
        times = [f"{cell[name]['ratio']:.2f}{'' if cell[name]['same_tokens'] else '*'}" for name in shown]
        seconds = [f"{row['vision'] + row['decoding']:.2f}" for row in (stock, off)]
        memory = [f"{row['peak_megabytes']:.0f}" for row in (stock, off)]
        rows.append(
            [f"{names[model]}, {dtype}", str(batch), str(beams), *times, " / ".join(seconds), " / ".join(memory)]
        )
    return table(["", "images", "beams", *shown, "seconds, stock / RBM off", "peak MB, stock / RBM off"], rows)


def int8_block() -> str:
    """What the captions of the embedded model of 0.1.0 lose in 8 bits."""
    results, int8 = (read(f"{BENCHMARKS}/captions_{name}.json") for name in ("seed_0", "int8"))
    said, rounded = ({entry["image_id"]: entry for entry in result["captions"]} for result in (results, int8))
    rows = []
    for name in ("BLIP", "BLIP-RBM"):
        ciders = [f"{result['systems'][name]['CIDEr-D']:.1f}" for result in (results, int8)]
        same = sum(said[i][name] == rounded[i][name] for i in rounded) / len(rounded)
        rows.append([name, *ciders, f"{same:.0%}"])
    return table(["", "CIDEr-D, fp32", "CIDEr-D, 8 bits", "same captions"], rows)


def training_block() -> str:
    captioner, rbm, phrases, tuning = (
        read(f"{CHECKPOINT}/{stage}.json") for stage in ("captioner", "rbm", "phrases", "tuning")
    )
    minutes, stage = 0.0, captioner
    while stage:
        minutes, stage = minutes + stage["minutes"], stage.get("went_on_from")
    plain, last, known, chosen = (
        tuning["chosen_plain"],
        rbm["held_back"][-1],
        phrases["held_back"],
        tuning["rerank"]["chosen"],
    )
    guide = (chosen["rbm_guidance"], chosen.get("rbm_guidance_rarity"))
    candidates = tuning["rerank"]["candidates"][", ".join(str(weight) for weight in guide if weight)]
    rows = [
        ["captioner", f"{minutes:.0f}", f"CIDEr-D {plain['cider']:.1f}, vocabulary {plain['vocabulary']} on {tuning['images']} images"],
        ["RBM", f"{rbm['minutes']:.1f}", f"R@10 {last['image_to_text_r10']:.0f} image to text, {last['text_to_image_r10']:.0f} text to image, word AP {last['word_ap']:.2f}"],
        ["phrases", f"{phrases['seconds'] / 60:.1f}", f"predicted CIDEr-D of an image's own captions {100 * known['own_captions']:.1f}, of another's {100 * known['other_captions']:.1f}; {phrases['phrases']:,} phrases"],
        ["decoding", "", f"CIDEr-D of the first candidate {candidates['first_candidate']:.1f}, of a random one {candidates['random_candidate']:.1f}, of the chosen one {chosen['cider']:.1f} (vocabulary {chosen['vocabulary']}), of the best one {candidates['oracle']:.1f}"],
    ]  # fmt: skip
    return table(["stage", "minutes", "on held-back training images"], rows)


def cost_block() -> str:
    """What the RBM stage takes: minutes of the short path, memory against the number of images."""
    quick, scale = (read(f"{BENCHMARKS}/{name}.json") for name in ("rbm_quick", "scale"))
    last = quick["held_back"][-1]
    said = (
        f"From a frozen captioner to its RBM on 6,000 images (`training/recipes/rbm-quick.yaml`): "
        f"{quick['minutes'] + quick['minutes_of_encoding']:.1f} minutes, {quick['minutes_of_encoding']:.1f} of them encoding; peak memory "
        f"{quick['peak_memory_mb']:,.0f} MB; R@10 {last['image_to_text_r10']:.0f} image to text, {last['text_to_image_r10']:.0f} text to image "
        "on held-back images."
    )
    rows = [[rows, f"{entry['anonymous_mb']:,.0f}", f"{entry['peak_mb']:,.0f}", f"{entry['seconds']:.0f}"] for rows, entry in scale["rows"].items()]  # fmt: skip
    return (
        f"{said}\n\n{table(['synthetic images', 'memory, MB', 'peak with memory-mapped pages, MB', 'seconds'], rows)}"
    )


def rbm_speed_block() -> str:
    speed = read(f"{BENCHMARKS}/rbm.json")
    settings, threads = speed["settings"], speed["results"]
    said = (
        f"PCD-1, {settings['visible']} visible and {settings['hidden']} hidden units, batches of {settings['batch']:,}; samples per second, "
        f"median of {settings['rounds']} rounds (times the best peer, share of the bound of its precision):"
    )
    cell = lambda r, name: (
        f"{r['samples_per_second'][name]:,.0f} ({r['times_best_peer'][name]:.1f}, {r['share_of_own_bound'][name]:.0%})"
    )
    names = [name for name in threads[0]["samples_per_second"] if "compiled" not in name]  # 0.1.0's kernels are gone
    header = ["", *(f"{r['threads']} thread{'s' * (r['threads'] > 1)}" for r in threads)]
    return f"{said}\n\n{table(header, [[name, *(cell(r, name) for r in threads)] for name in names])}"


def rbm_likelihood_block() -> str:
    likelihood = read(f"{BENCHMARKS}/rbm_likelihood.json")
    settings = likelihood["settings"]
    said = (
        f"Held-back digits (binarised, 8 x 8), {settings['hidden']} hidden units, {settings['epochs']} epochs, the best learning rate of each "
        f"library on a validation part, mean of {len(settings['seeds'])} seeds, nats by the same AIS:"
    )
    rows = [
        [name, *(f"{entry[key]:.2f}" for key in ("test", "train", "spread"))]
        for name, entry in likelihood["libraries"].items()
        if "compiled" not in name
    ]
    return f"{said}\n\n{table(['', 'log P, test', 'log P, train', 'spread over seeds'], rows)}"


def rbm_uses_block() -> str:
    uses = read(f"{BENCHMARKS}/digits_rbm.json")
    mean = lambda values: sum(values) / len(values)
    probe, reduced, start = uses["features"], uses["dimension_reduction"], uses["initialisation"]
    rows = [
        ["generation: log P of held-back digits, nats", f"{uses['log_likelihood_test']:.1f}", f"{uses['log_likelihood_independent_pixels']:.1f}, independent pixels"],
        [f"features: linear probe on {probe['units']} hidden units", f"{probe['hidden_units']:.1%}", f"{probe['pixels']:.1%}, pixels"],
        [f"initialisation: network with {start['labelled']} labels", f"{mean(start['from_dbn']):.1%}", f"{mean(start['from_chance']):.1%}, from chance"],
        [f"dimension reduction: 5 nearest neighbours on {reduced['units']} numbers", f"{reduced['rbm']:.1%}", f"{reduced['pca']:.1%}, PCA"],
    ]  # fmt: skip
    return table(["use, on scikit-learn's digits", "RBM", "without"], rows)


def retrieval_table(results: dict) -> str:
    """Recall both ways, median ranks and zero-shot accuracy of `results["runs"]`."""
    rows = []
    for name, entry in results["runs"].items():
        cells = [
            "/".join(f"{entry[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")
        ]
        ranks = f"{entry['image_to_text_median_rank']:.0f}, {entry['text_to_image_median_rank']:.0f}"
        shot = f"{entry['zero_shot']['accuracy']:.0%}" if "zero_shot" in entry else ""
        rows.append([name, *cells, ranks, shot])
    return table(["", "image to text R@1/5/10", "text to image R@1/5/10", "median rank", "zero-shot"], rows)


def second_look_block() -> str:
    retrieval, captioner = (read(f"experiments/retrieval/{name}.json") for name in ("retrieval", "captioner_second"))
    epoch_choice = sum(entry["eval_seconds"] for entry in captioner["held_back"]) / 60
    return (
        f"{retrieval_table(retrieval)}\n\nTraining took {retrieval['core_minutes_of_training'] / 2:.1f} minutes of two cores without encoding, "
        f"and {captioner['minutes'] - epoch_choice:.1f} for the second captioner."
    )


def study_block() -> str:
    study = read("experiments/alignment/alignment_study.json")
    rows = [[name, f"{entry['knn']:.0%}", f"{entry['linear']:.0%}", f"{entry['alignment']:.1f}"] for name, entry in study["encoders"].items()]  # fmt: skip
    r = {name: entry["pearson"] for name, entry in study["correlation_with_alignment"].items()}
    said = (
        f"Probed on {study['images']:,} training images. Pearson's r with alignment over these encoders: nearest neighbours {r['knn']:.2f}, "
        f"linear classifier {r['linear']:.2f}."
    )
    header = ["frozen encoder", "nearest neighbours", "linear classifier", "R@10 of a linear probe"]
    return f"{table(header, rows)}\n\n{said}"


def model_index(results: dict) -> str:
    """The card's `model-index`, by which the Hub shows results."""
    ours = results["systems"]["BLIP-RBM"]
    metrics = [
        f"    - type: {name.lower()}\n      value: {ours[name]:.1f}\n      name: {name}"
        for name in ("CIDEr-D", "BLEU-4", "ROUGE-L")
    ]
    return "\n".join(
        [
            "model-index:\n- name: blip-rbm-small\n  results:",
            "  - task:\n      type: image-text-to-text\n      name: image captioning",
            f"    dataset:\n      type: {results['dataset']}",
            f"      name: Flickr8k, {results['images']:,} images of the {results['split']} split",
            "    metrics:",
            *metrics,
        ]
    )


def blocks() -> dict[str, str]:
    """What stands between the markers of each name."""
    results, unlike = read(f"{CHECKPOINT}/results.json"), read(f"{CHECKPOINT}/confidence.json")["unlike"]
    return {
        "parameters": f"{results['parameters'] / 1e6:.1f} M parameters",
        "gain": interval(results["difference"]["CIDEr-D"]),
        "model-index": model_index(results),
        "results": results_block(results),
        "settings": settings_block(results),
        "ablation": ablation_block(read(f"{BENCHMARKS}/captions_seed_0.json")),
        "seeds": seeds_block("seed"),
        "varied": seeds_block("varied"),
        "worlds": worlds_block(),
        "worlds_cider": worlds_cider_block(),
        "controls": controls_block(),
        "control": control_block(),
        "refine": refine_block(),
        "refine-sentence": refine_sentence(),
        "diversity": diversity_block(),
        "confidence": confidence_block(),
        "unlike": unlike_block(unlike),
        "unlike-summary": unlike_summary(unlike),
        "unlike-pooled": unlike_summary(read(f"{BENCHMARKS}/confidence_0.1.0.json")["unlike"]),
        "speed": speed_block(),
        "int8": int8_block(),
        "training": training_block(),
        "cost": cost_block(),
        "rbm-speed": rbm_speed_block(),
        "rbm-likelihood": rbm_likelihood_block(),
        "rbm-uses": rbm_uses_block(),
        "alignment": retrieval_table(read("experiments/alignment/alignment.json")),
        "second-look": second_look_block(),
        "study": study_block(),
    }


def filled(text: str, content: dict[str, str]) -> str:
    """The text with what stands between each pair of markers renewed (in YAML: `# name` ... `# /name`).

    Raises:
        ValueError: for a marker that `content` does not know, or that is not closed.
    """

    def renewed(match):
        start, name, line, _, end = match.groups()  # `line`: a line break, where the block has lines of its own
        if name not in content:
            raise ValueError(f"{start}: no block of that name; known are {', '.join(content)}")
        return start + line + content[name] + line + end

    text = re.sub(r"(<!-- ([\w-]+) -->)(\n?)(.*?)(<!-- /\2 -->)", renewed, text, flags=re.S)
    text = re.sub(r"^(# ([\w-]+))(\n)(.*?)(^# /\2)$", renewed, text, flags=re.S | re.M)
    for name in content:
        for opened, closed in ((f"<!-- {name} -->", f"<!-- /{name} -->"), (f"^# {name}$", f"^# /{name}$")):
            if re.search(opened, text, re.M) and not re.search(closed, text, re.M):
                raise ValueError(
                    f"the block {name} is opened and not closed: write its closing marker, {closed.strip('^$')}"
                )
    return text


def derived_files() -> dict[Path, str]:
    """Every file that is made from others, with what should stand in it."""
    content = blocks()
    files = {REPO / name: filled((REPO / name).read_text(), content) for name in DOCUMENTS}
    return files | {REPO / CHECKPOINT / "README.md": files[REPO / "model_card.md"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = {file: text for file, text in derived_files().items() if not file.exists() or file.read_text() != text}
    if not args.check:
        for file, text in stale.items():
            file.write_text(text)
    names = ", ".join(str(file.relative_to(REPO)) for file in stale)
    print(f"{'differ' if args.check else 'written'}: {names or 'none'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
