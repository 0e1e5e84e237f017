"""Keep what is derived true: the numbers of the results files in README.md and model_card.md, between their markers, and
the embedded model's copies of the card and of the package's code.

    python -m training.report           # write
    python -m training.report --check   # exit 1 if a file differs from what would be written
"""

import argparse
import json
import re
import sys
from pathlib import Path


REPO = Path(__file__).resolve().parent.parent
CHECKPOINT = REPO / "checkpoints" / "blip-rbm-small"
COLUMNS = {
    "CIDEr-D": "{:.1f}",
    "BLEU-4": "{:.1f}",
    "ROUGE-L": "{:.1f}",
    "METEOR": "{:.1f}",
    "vocabulary": "{:.0f}",
    "distinct_2": "{:.3f}",
    "novel": "{:.2f}",
    "mean_length": "{:.1f}",
}


def results_table(results: dict) -> str:
    settings, rbm = results["settings"], results["rbm"]
    measured = results["systems"]["BLIP"]  # METEOR only where there was Java
    columns = {key: form for key, form in COLUMNS.items() if key in measured}
    lines = [
        f"| {results['images']:,} images of {results['dataset']} {results['split']} | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, system in results["systems"].items():
        lines.append(f"| {name} | " + " | ".join(form.format(system[key]) for key, form in columns.items()) + " |")
    cells = []
    for key in columns:
        entry = results["difference"].get(key)
        cells.append(f"{entry['difference']:+.1f} [{entry['low']:+.1f}, {entry['high']:+.1f}]" if entry else "")
    lines.append("| difference [95 % interval] | " + " | ".join(cells) + " |")
    rerank = f"re-rank of {rbm['rbm_rerank_candidates']} beams" if rbm["rbm_rerank"] else "no re-rank"
    growth = rbm.get("rbm_guidance_rarity", 0.0)
    rarity = f", growing by {growth:.0%} of it with each nat of a word's rarity" if growth else ""
    lines += [
        "",
        f"{settings['num_beams']} beams, length penalty {settings['length_penalty']:g}, repetition penalty "
        f"{settings['repetition_penalty']:g}, at most {settings['max_new_tokens']} new tokens, {results['references_per_image']} "
        f"references an image, COCO tokenization; novel: share of captions that no training image has. "
        f"BLIP-RBM: the same BLIP with guide (weight {rbm['rbm_guidance']:g}{rarity}) and {rerank}, chosen on held-back training "
        "images. Intervals: paired bootstrap over images.",
    ]
    return "\n".join(lines)


def seeds_table(seeds: list[dict]) -> str:
    """The difference that the RBM makes, of RBMs trained from different seeds."""
    lines = ["| seed | CIDEr-D | BLEU-4 | ROUGE-L | METEOR | vocabulary | novel |", "|---" * 7 + "|"]
    for number, results in enumerate(seeds):
        blip, ours = results["systems"].values()
        cells = [
            f"{entry['difference']:+.1f} [{entry['low']:+.1f}, {entry['high']:+.1f}]"
            for entry in results["difference"].values()
        ]
        cells.append(f"{ours['METEOR'] - blip['METEOR']:+.1f}" if "METEOR" in ours else "")
        cells.append(f"{ours['vocabulary'] / blip['vocabulary'] - 1:+.0%}")
        cells.append(f"{100 * (ours['novel'] - blip['novel']):+.1f}" if "novel" in ours else "")
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def varied_block(seeds: list[dict], results: dict) -> str:
    """The table, and what differs from the embedded model's `results`, of which the first is the RBM, for those who want to decode so."""
    settings = {name: value for name, value in seeds[0]["rbm"].items() if value != results["rbm"][name]}
    return f"{seeds_table(seeds)}\n\nThe embedded model does so after `model.config.update({settings})`."


def diversity_table(diversity: dict) -> str:
    lines = [
        "| way | setting | CIDEr-D, mean of an image's captions | best of them | Div-2 | mBLEU-4 |",
        "|---" * 6 + "|",
    ]
    for way, settings in diversity["ways"].items():
        for setting, entry in settings.items():
            lines.append(
                f"| {way} | {setting} | {entry['cider_mean']:.1f} | {entry['cider_best']:.1f} | {entry['div_2']:.2f} | {entry['mbleu_4']:.2f} |"
            )
    settings = diversity["settings"]
    return "\n".join(
        [*lines, "", f"{settings['captions']} captions of each of {diversity['images']} images of {settings['split']}."]
    )


def generate_table(speed: dict) -> str:
    """A row for each model, precision, number of images and of beams; contenders side by side."""
    names = {"blip_base": "BLIP-base's shape, 384 px", "embedded": "embedded model"}
    first_dtype = speed["settings"]["dtypes"][0]
    cells = {}
    for row in speed["rows"]:
        cell = cells.setdefault((names[row["model"]], row["dtype"], row["batch"], row["beams"]), {})
        cell[row["contender"].removeprefix("BLIP-RBM, ")] = row
    contenders = list(dict.fromkeys(name for cell in cells.values() for name in list(cell)[1:]))
    guide, samples = contenders[1], "best of 10 samples"
    lines = [
        f"| | images | beams | {' | '.join(contenders)} | {guide}, cost | 10 samples, times RBM off | vision, s | decoding, s | cache, MB | peak, MB |",
        "|---" * (len(contenders) + 9) + "|",
    ]
    for (model, dtype, batch, beams), cell in sorted(cells.items(), key=lambda item: item[0][1] != first_dtype):
        stock, *_ = cell.values()
        ratios = []
        for name in contenders:
            row = cell.get(name)
            first = f" ({row['against_first_dtype']:.2f})" if row and dtype != first_dtype else ""
            ratios.append(f"{row['ratio']:.2f}{'' if row['same_tokens'] else '*'}{first}" if row else "")
        costs = [
            f"{100 * (1 / cell[guide]['against_off'] - 1):+.1f} %",
            f"{1 / cell[samples]['against_off']:.1f}" if samples in cell else "",
        ]
        pairs = [
            f"{stock[key]:{form}} / {cell['RBM off'][key]:{form}}"
            for key, form in (
                ("vision", ".2f"),
                ("decoding", ".2f"),
                ("cache_megabytes", ".0f"),
                ("peak_megabytes", ".0f"),
            )
        ]
        lines.append(f"| {model}, {dtype} | {batch} | {beams} | {' | '.join(ratios + costs + pairs)} |")
    return "\n".join(lines)


def speed_block(processors: list[tuple[list[dict], dict]], folder: dict) -> str:
    """Results of `benchmarks.generate`, with the same settings but the number of rounds, and what they mean; how long a folder takes.

    Args:
        processors: of each its results, and the bound.
    """
    settings = processors[0][0][0]["settings"]
    rounds = " or ".join(map(str, sorted({speed["settings"]["pairs"] for speeds, _ in processors for speed in speeds})))
    meaning = (
        f"{settings['threads']} threads, {settings['new_tokens']} new tokens, medians of {rounds} rounds in turn, each contender in a process of its own. Times stock: of the whole, "
        f"round by round, stock computing in the same precision (in brackets: in {settings['dtypes'][0]}; of the embedded model, whose tower stock BLIP "
        "has not: the same model with transformers' cache); * where tokens differ from stock's. Seconds and memory of BLIP and of BLIP-RBM with "
        "the RBM off; peak: of the process, above what it held before."
    )
    parts = [meaning]
    for speeds, bound in processors:
        name = speeds[0]["settings"].get(
            "processor",
            "A processor with AVX512 and without AMX, whose name was not recorded, before the tower took four images at a time and samples were drawn "
            "by one number a row",
        )
        parts += [f"{name}:", *map(generate_table, speeds), bound_line(bound)]
    return "\n\n".join([*parts, folder_line(folder)])


def bound_line(bound: dict) -> str:
    """How much of what the processor can do `generate` reaches."""
    parts = []
    for dtype in (name for name in bound if isinstance(bound[name], dict)):
        entry = bound[dtype]
        reached = ", ".join(f"{part} {entry['bound'][part] / entry['seconds'][part]:.0%}" for part in entry["bound"])
        parts.append(f"{dtype} {reached}")
    return (
        f"Of the processor's bound, BLIP-base's shape, 4 images and 3 beams, RBM off, on {bound['threads']} threads: {'; '.join(parts)} "
        "(steps: decoding without the image's keys and values)."
    )


def folder_line(folder: dict) -> str:
    return (
        f"`blip-rbm caption FOLDER` on {folder['images']} photographs, {folder['threads']} thread{'s' * (folder['threads'] > 1)}: "
        f"{folder['images_per_second']:.1f} images per second, {folder['share_in_the_model']:.0%} of the time in the model "
        f"({folder['share_of_all_in_the_model']:.0%} with loading it)."
    )


def int8_line(results: dict, int8: dict) -> str:
    """What the embedded model's captions lose in 8 bits."""
    said, rounded = ({entry["image_id"]: entry for entry in result["captions"]} for result in (results, int8))
    parts = []
    for name in ("BLIP", "BLIP-RBM"):
        before, after = (result["systems"][name]["CIDEr-D"] for result in (results, int8))
        same = sum(said[i][name] == rounded[i][name] for i in rounded) / len(rounded)
        parts.append(
            f"{name} {after:.1f} CIDEr-D in 8 bits, {before:.1f} in fp32, {same:.0%} of the captions the same word for word"
        )
    return f"{int8['images']:,} images of {int8['dataset']} {int8['split']}: {'; '.join(parts)}."


def ablation_table(results: dict) -> str:
    """Each strategy alone, and what costs as many beams without an RBM."""
    columns = ("CIDEr-D", "BLEU-4", "ROUGE-L", "vocabulary", "novel")
    lines = ["| same images | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, system in (results["systems"] | results["ablation"]).items():
        lines.append(f"| {name} | " + " | ".join(COLUMNS[key].format(system[key]) for key in columns) + " |")
    seconds = {name: system["seconds"] for name, system in results["systems"].items()}
    ratio = seconds["BLIP-RBM"] / seconds["BLIP"]
    return "\n".join(
        [
            *lines,
            "",
            f"Seconds for all images, vision included: BLIP {seconds['BLIP']:.0f}, BLIP-RBM {seconds['BLIP-RBM']:.0f} ({ratio:.1f} times). "
            "The oracle looks at the references; consensus alone is minimum Bayes risk without the RBM.",
        ]
    )


def confidence_table(result: dict) -> str:
    confidence, energy = result["confidence"], result["energy_auc"]
    return "\n".join(
        [
            f"| {result['images']:,} images of {result['split']} | |",
            "|---|---|",
            f"| captions that are right (as near to the references as half of the human ones) | {confidence['share_right']:.0%} |",
            f"| AUC of the confidence for it | {confidence['auc']:.2f} |",
            f"| expected calibration error | {confidence['expected_calibration_error']:.3f} |",
            f"| CIDEr-D of all captions, without the least confident fifth, of the most confident fifth | "
            f"{confidence['cider_all']:.1f}, {confidence['cider_abstaining_at_20_percent']:.1f}, "
            f"{confidence['cider_of_most_confident']['0.2']:.1f} |",
            "| AUC of the energy F(x) against images of other kinds | "
            + ", ".join(f"{kind} {auc:.2f}" for kind, auc in energy.items())
            + " |",
        ]
    )


def training_table(captioner: dict, rbm: dict, phrases: dict, tuning: dict) -> str:
    minutes, stage = 0.0, captioner
    while stage:
        minutes, stage = minutes + stage["minutes"], stage.get("went_on_from")
    last = rbm["held_back"][-1]
    plain, known, chosen = tuning["chosen_plain"], phrases["held_back"], tuning["rerank"]["chosen"]
    guide = (chosen["rbm_guidance"], chosen.get("rbm_guidance_rarity"))
    candidates = tuning["rerank"]["candidates"][", ".join(str(weight) for weight in guide if weight)]
    rows = [
        ("captioner", f"{minutes:.0f}", f"CIDEr-D {plain['cider']:.1f}, vocabulary {plain['vocabulary']} on {tuning['images']} held-back images, as it decodes"),
        ("RBM", f"{rbm['minutes']:.1f}", f"R@10 {last['image_to_text_r10']:.0f} image to text, {last['text_to_image_r10']:.0f} text to image, word AP {last['word_ap']:.2f}"),
        ("phrases", f"{phrases['seconds'] / 60:.1f}", f"CIDEr-D expected of an image's own captions {100 * known['own_captions']:.1f}, of another's {100 * known['other_captions']:.1f}; {phrases['phrases']:,} phrases"),
        (
            "re-rank",
            "",
            f"first of the candidates {candidates['first_candidate']:.1f}, random {candidates['random_candidate']:.1f}, "
            f"chosen {chosen['cider']:.1f} (vocabulary {chosen['vocabulary']}), oracle {candidates['oracle']:.1f} CIDEr-D",
        ),
    ]  # fmt: skip
    lines = ["| stage | minutes | on held-back training images |", "|---|---|---|"]
    return "\n".join(lines + [f"| {stage} | {minutes} | {text} |" for stage, minutes, text in rows])


def rbm_speed_table(speed: dict) -> str:
    settings = speed["settings"]
    lines = [
        f"PCD-1, V {settings['visible']}, H {settings['hidden']}, batch {settings['batch']:,}, samples per second, medians of "
        f"{settings['rounds']} rounds in turn:",
        "",
    ]
    threads = speed["results"]
    lines.append("| | " + " | ".join(f"{r['threads']} thread{'s' * (r['threads'] > 1)}" for r in threads) + " |")
    lines.append("|---" * (len(threads) + 1) + "|")
    for name in threads[0]["samples_per_second"]:
        cells = [
            f"{r['samples_per_second'][name]:,.0f} ({r['times_best_peer'][name]:.1f} x best peer, "
            f"{r['share_of_own_bound'][name]:.0%} of its precision's bound)"
            for r in threads
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rates = "; ".join(
        f"{r['threads']}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in r["gflops"].items()) for r in threads
    )
    chosen = " and ".join(dict.fromkeys(r["chosen_precision"] for r in threads))
    return "\n".join(
        [*lines, "", f"GFLOP/s of matrix products by threads: {rates}. Precision that `auto` chose: {chosen}."]
    )


def rbm_likelihood_table(likelihood: dict) -> str:
    settings = likelihood["settings"]
    lines = [
        f"Held-back digits (binarised, 8 x 8), {settings['hidden']} hidden units, {settings['epochs']} epochs, each library's "
        f"best learning rate on a validation part, mean of {len(settings['seeds'])} seeds, nats by the same AIS:",
        "",
        "| | log P, test | log P, train | spread over seeds |",
        "|---|---|---|---|",
    ]
    for name, entry in likelihood["libraries"].items():
        lines.append(f"| {name} | {entry['test']:.2f} | {entry['train']:.2f} | {entry['spread']:.2f} |")
    return "\n".join(lines)


def rbm_uses_table(uses: dict) -> str:
    mean = lambda values: sum(values) / len(values)
    probe, reduced, start = uses["features"], uses["dimension_reduction"], uses["initialisation"]
    return "\n".join(
        [
            "| use, on scikit-learn's digits | RBM | without |",
            "|---|---|---|",
            f"| generation: log P of held-back digits (nats) | {uses['log_likelihood_test']:.1f} | "
            f"{uses['log_likelihood_independent_pixels']:.1f}, independent pixels |",
            f"| features: linear probe on {probe['units']} hidden units | {probe['hidden_units']:.1%} | {probe['pixels']:.1%}, pixels |",
            f"| initialisation: network with {start['labelled']} labels | {mean(start['from_dbn']):.1%} | "
            f"{mean(start['from_chance']):.1%}, from chance |",
            f"| dimension reduction: 5 nearest neighbours on {reduced['units']} numbers | {reduced['rbm']:.1%} | "
            f"{reduced['pca']:.1%}, PCA |",
        ]
    )


def retrieval_table(results: dict) -> str:
    lines = ["| | image to text R@1/5/10 | text to image R@1/5/10 | median rank | zero-shot |", "|---|---|---|---|---|"]
    for name, entry in results["runs"].items():
        cells = [
            "/".join(f"{entry[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")
        ]
        ranks = f"{entry['image_to_text_median_rank']:.0f}, {entry['text_to_image_median_rank']:.0f}"
        shot = f"{entry['zero_shot']['accuracy']:.0%}" if "zero_shot" in entry else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {ranks} | {shot} |")
    return "\n".join(lines)


def alignment_table(alignment: dict) -> str:
    """Retrieval of what was aligned, and what of all together."""
    return "\n".join(
        [
            f"Retrieval among {alignment['images']:,} images and {alignment['captions']:,} captions of Flickr8k {alignment['split']}, frozen encoders, "
            "trained on the training split less 400 images held back; zero-shot: classes named by the captions.",
            "",
            retrieval_table(alignment),
        ]
    )


def second_look_table(retrieval: dict, captioner: dict) -> str:
    """Retrieval in two steps, and what its parts took to train, without the captions by which the second captioner's epoch was chosen."""
    captioner_minutes = captioner["minutes"] - sum(entry["eval_seconds"] for entry in captioner["held_back"]) / 60
    minutes = retrieval["core_minutes_of_training"] / 2
    settings, ways = retrieval["settings"], retrieval["ways"]["hubs and likelihood"]
    chosen = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in ways.items())
    return "\n".join(
        [
            f"The mean of {len(settings['runs'])} of them, trained on all images; the {settings['candidates'][0]} best of each image and caption "
            "looked at again with the embedded "
            f"captioner, and the {settings['candidates'][1]} best then with one on DINOv2's tokens (chosen on held-back images: {chosen}):",
            "",
            retrieval_table(retrieval),
            "",
            f"Trained, encoding excluded and the embedded captioner taken as it is, in {minutes:.1f} minutes of two cores, and the second "
            f"captioner in {captioner_minutes:.1f}.",
        ]
    )


def cost_table(quick: dict, scale: dict) -> str:
    """What the RBM stage takes: minutes of the ten-minute path, memory against the number of images."""
    minutes = quick["minutes"] + quick["minutes_of_encoding"]
    last = quick["held_back"][-1]
    lines = [
        f"From a frozen captioner to its RBM on 6,000 images (`training/recipes/rbm-quick.yaml`): {minutes:.1f} minutes, of which encoding "
        f"{quick['minutes_of_encoding']:.1f}; peak memory {quick['peak_memory_mb']:,.0f} MB; R@10 {last['image_to_text_r10']:.0f} image to text, "
        f"{last['text_to_image_r10']:.0f} text to image among the held-back images.",
        "",
        "| synthetic images | memory of the process (MB) | peak with memory-mapped pages (MB) | seconds |",
        "|---|---|---|---|",
    ]
    for rows, entry in scale["rows"].items():
        lines.append(f"| {rows} | {entry['anonymous_mb']:,.0f} | {entry['peak_mb']:,.0f} | {entry['seconds']:.0f} |")
    return "\n".join(lines)


def capfilt_table(results: list[dict]) -> str:
    lines = [
        "| captions exchanged | estimated | AUC of finding them | right before | right after | kept |",
        "|---" * 6 + "|",
    ]
    for entry in results:
        lines.append(
            f"| {entry['capfilt']['shuffle']:.0%} | {entry['share_wrong_estimated']:.0%} | {entry['auc_of_wrong_captions']:.3f} | {entry['share_right_before']:.0%} | "
            f"{entry['share_right_after']:.0%} | {entry['kept'] / entry['captions']:.0%} |"
        )
    return "\n".join(lines)


def contrastive_table(losses: dict) -> str:
    lines = ["| loss, batch | peak memory (MB) | seconds | apart from the loss computed whole |", "|---|---|---|---|"]
    for name, entry in losses["rows"].items():
        apart = f"{entry['loss_apart']:.1g}, gradients {entry['gradients_apart']:.1g}" if "loss_apart" in entry else ""
        lines.append(f"| {name} | {entry['peak_memory_mb']:,.0f} | {entry['seconds']:.1f} | {apart} |")
    return "\n".join(lines)


def aligned_captioner_table(captioners: dict[str, dict]) -> str:
    """Held-back CIDEr-D of captioners whose way from image to words was trained on raw and on aligned tokens."""
    passes = [f"{entry['epoch']:.0f}" for entry in next(iter(captioners.values()))["held_back"]]
    lines = [
        "| tokens | " + " | ".join(f"CIDEr-D after pass {number}" for number in passes) + " | vocabulary |",
        "|---" * (len(passes) + 2) + "|",
    ]
    for name, captioner in captioners.items():
        cells = [f"{entry['eval_cider']:.1f}" for entry in captioner["held_back"]]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {captioner['held_back'][-1]['eval_vocabulary']} |")
    return "\n".join(lines)


def noise_table(noise: dict) -> str:
    """What CapFilt gives a captioner."""
    lines = [
        "| captions exchanged | AUC of finding them | right before | right after | CIDEr-D, noisy | filtered | filtered + synthetic |",
        "|---" * 7 + "|",
    ]
    for percent, entry in noise["results"].items():
        if percent != "right pairs":
            ciders = [f"{system['CIDEr-D']:.1f}" for system in entry["captioners"].values()]
            lines.append(
                f"| {percent} % | {entry['auc_of_wrong_captions']:.3f} | {entry['share_right_before']:.0%} | "
                f"{entry['share_right_after']:.0%} | " + " | ".join(ciders) + " |"
            )
    right = noise["results"]["right pairs"]["CIDEr-D"]
    return "\n".join([*lines, "", f"The same captioner on the right pairs: {right:.1f}."])


def study_table(study: dict) -> str:
    lines = [
        "| frozen encoder | nearest neighbours | linear classifier | R@10 of a linear probe |",
        "|---|---|---|---|",
    ]
    for name, entry in study["encoders"].items():
        lines.append(f"| {name} | {entry['knn']:.0%} | {entry['linear']:.0%} | {entry['alignment']:.1f} |")
    found = study["correlation_with_alignment"]
    measures = {"knn": "nearest neighbours", "linear": "the linear classifier"}
    said = ", ".join(f"{measures[name]} {r['pearson']:.2f}" for name, r in found.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Probed on {study['images']:,} training images. Correlation with alignment over these encoders (Pearson's r): {said}.",
        ]
    )


def model_index(results: dict) -> str:
    metrics = [
        f"    - type: {key.lower()}\n      value: {value:.1f}\n      name: {key}"
        for key, value in results["systems"]["BLIP-RBM"].items()
        if key in ("CIDEr-D", "BLEU-4", "ROUGE-L")
    ]
    return "\n".join(
        [
            "model-index:",
            "- name: blip-rbm-small",
            "  results:",
            "  - task:",
            "      type: image-text-to-text",
            "      name: image captioning",
            "    dataset:",
            f"      type: {results['dataset']}",
            f"      name: Flickr8k, {results['images']:,} images of the {results['split']} split",
            "    metrics:",
            *metrics,
        ]
    )


def blocks() -> dict[str, str]:
    read = lambda name: json.loads((CHECKPOINT / name).read_text())
    results = read("results.json")
    measured = REPO / "benchmarks" / "results"
    benchmark = lambda name: json.loads((measured / name).read_text())
    names = lambda suffix: [f"generate{part}{suffix}.json" for part in ("", "_16", "_embedded")]  # of one processor
    speeds = lambda suffix: [name for name in names(suffix) if (measured / name).exists()]
    return {
        "rbm-speed": rbm_speed_table(benchmark("rbm.json")),
        "rbm-likelihood": rbm_likelihood_table(benchmark("rbm_likelihood.json")),
        "rbm-uses": rbm_uses_table(benchmark("digits_rbm.json")),
        "results": results_table(results),
        "seeds": seeds_table([benchmark(f"captions_seed_{seed}.json") for seed in range(3)]),
        "varied": varied_block([benchmark(f"captions_varied_{seed}.json") for seed in range(3)], results),
        "ablation": ablation_table(results),
        "diversity": diversity_table(benchmark("diversity.json")),
        "speed": speed_block(
            [
                (list(map(benchmark, speeds(suffix))), benchmark(f"generate_bound{suffix}.json"))
                for suffix in ("", "_amx")
            ],
            benchmark("folder.json"),
        ),
        "int8": int8_line(results, benchmark("captions_int8.json")),
        "confidence": confidence_table(read("confidence.json")),
        "alignment": alignment_table(benchmark("alignment.json")),
        "second-look": second_look_table(*map(benchmark, ("retrieval.json", "captioner_second.json"))),
        "noise": noise_table(benchmark("noise.json")),
        "contrastive": contrastive_table(benchmark("contrastive.json")),
        "aligned-captioner": aligned_captioner_table(
            {name: benchmark(f"captioner_{name}.json") for name in ("raw", "aligned")}
        ),
        "study": study_table(benchmark("alignment_study.json")),
        "capfilt": capfilt_table([benchmark(f"capfilt_{share}.json") for share in (30, 60)]),
        "cost": cost_table(benchmark("rbm_quick.json"), benchmark("scale.json")),
        "training": training_table(*(read(f"{stage}.json") for stage in ("captioner", "rbm", "phrases", "tuning"))),
        "parameters": f"{results['parameters'] / 1e6:.1f} M parameters",
        "model-index": model_index(results),
    }


def filled(text: str) -> str:
    """The text with the content of every `<!-- name -->...<!-- /name -->` (in YAML: `# name` ... `# /name`) renewed."""
    for name, content in blocks().items():
        for start, end, flags in (
            (f"<!-- {name} -->\n?", f"\n?<!-- /{name} -->", 0),
            (f"^# {name}\n", f"\n?# /{name}$", re.M),
        ):
            found = re.search(f"({start}).*?({end})", text, flags=re.S | flags)
            if found:
                text = text[: found.end(1)] + content + text[found.start(2) :]
    return text


def derived_files() -> dict[Path, str]:
    """Every file that is made from others, with what should stand in it."""
    card = filled((REPO / "model_card.md").read_text())
    files = {
        REPO / "README.md": filled((REPO / "README.md").read_text()),
        REPO / "training" / "README.md": filled((REPO / "training" / "README.md").read_text()),
        REPO / "model_card.md": card,
        CHECKPOINT / "README.md": card,
    }
    for code in (REPO / "modeling_blip_rbm").glob("*.py"):
        if code.name not in ("__init__.py", "__main__.py"):
            files[CHECKPOINT / code.name] = code.read_text()
    return files


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
