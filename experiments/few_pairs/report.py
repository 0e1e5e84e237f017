"""Curves and the tables of README.md, from the results."""

from pathlib import Path

import matplotlib

from training.report import filled, interval, table


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# What is shown of each measure: its name, and what it is multiplied with.
MEASURES = {
    "word_ap": ("word AP, %", 100),
    "per_word_ap": ("AP a word, %", 100),
    "log_likelihood": ("log P(words given the image), nats a caption", 1),
    "image_to_text_r10": ("R@10 image to text, %", 100),
    "text_to_image_r10": ("R@10 text to image, %", 100),
    "rerank_cider": ("CIDEr-D of re-rank", 1),
}


def pairs_tables(results: dict) -> str:
    """The mean of every measure by number of pairs, then differences of the RBM from each control."""
    means, parts = results["means"], []
    shown = {
        key: value
        for key, value in MEASURES.items()
        if any(key in each for each in next(iter(means.values())).values())
    }
    for key, (title, scale) in shown.items():
        names = next(iter(means.values()))
        rows = [[name, *(f"{scale * means[count][name][key]:.1f}" for count in means)] for name in names]
        parts.append(table([title, *(f"{int(count):,} pairs" for count in means)], rows))
    for mine, of_mine in next(iter(results["differences"].values())).items():
        rows = [
            [other, title, *(interval(results["differences"][count][mine][other][key], scale) for count in means)]
            for other in of_mine
            for key, (title, scale) in shown.items()
        ]
        parts.append(table([f"{mine}, minus", "", *(f"{int(count):,} pairs" for count in means)], rows))
    return "\n\n".join(parts)


def said_table(results: dict) -> str:
    rows = []
    for count, means in results["means"].items():
        for name, value in means.items():
            parameters = results["parameters"][count].get(name)
            difference = results["differences"][count].get(name)
            rows.append(
                [
                    f"{int(count):,}", name, f"{parameters:,}" if parameters else "", f"{value:.2f}",
                    interval(difference, form="+.2f") if difference else "",
                ]
            )  # fmt: skip
    return table(["pairs", "system", "parameters", "log P(rest), nats a caption", "RBM minus it"], rows)


def noisy_table(results: dict) -> str:
    rows = [
        [title, name, "{auc:.3f} [{low:.3f}, {high:.3f}]".format(**auc), interval(entry["differences"][name], form="+.3f") if name in entry["differences"] else ""]
        for title, entry in results.items()
        if title != "labels"
        for name, auc in entry["auc"].items()
    ]  # fmt: skip
    said = (
        f"\n\nJudged: {', '.join(f'{n} {label}' for label, n in results['labels'].items())}."
        if "labels" in results
        else ""
    )
    return table(["wrong captions", "system", "AUC", "RBM minus it"], rows) + said


def hybrid_table(results: dict) -> str:
    rows = []
    for count, kinds in results.items():
        for name, by_weight in kinds.items():
            for weight, entry in by_weight.items():
                cells = [f"{MEASURES[key][1] * entry[key]:.1f}" if key in entry else "" for key in MEASURES]
                rows.append([f"{int(count):,}", name, weight, *cells, f"{entry['density']:,.0f}"])
    header = [
        "pairs",
        "generative term",
        "its weight",
        *(title for title, _ in MEASURES.values()),
        "log P(image, words), nats",
    ]
    return table(header, rows)


def draw_pairs(path: Path, results: dict):
    """Every measure against the number of pairs, a line a system."""
    means = results["means"]
    shown = [key for key in MEASURES if any(key in entry for entry in next(iter(means.values())).values())]
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, shown):
        title, scale = MEASURES[key]
        for name in next(iter(means.values())):
            style = "-" if name.startswith("rbm") else "--"
            axis.plot(
                [int(n) for n in means], [scale * means[n][name][key] for n in means], style, marker=".", label=name
            )
        axis.set(title=title, xlabel="pairs", xscale="log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_hybrid(path: Path, results: dict):
    """Every measure against the weight of the generative term; a weight of 0 stands at the left end, but not of the density, which is then far
    below all others."""
    panels = MEASURES | {"density": ("log P(image, words), held back, nats; weights above 0", 1)}
    found = next(iter(next(iter(results.values())).values()))
    shown = [key for key in panels if key in next(iter(found.values()))]
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, shown):
        title, scale = panels[key]
        for count, kinds in results.items():
            for name, by_weight in kinds.items():
                points = [
                    (float(weight) or 0.003, scale * entry[key])
                    for weight, entry in by_weight.items()
                    if float(weight) or key != "density"
                ]
                axis.plot(*zip(*points), marker=".", label=f"{int(count):,} pairs, {name}")
        axis.set(title=title, xlabel="weight of the generative term", xscale="log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_report(folder: Path, results: dict):
    """README.md's tables, where it has their markers, and the curves of what was answered."""
    tables = {"pairs": pairs_tables, "said": said_table, "noisy": noisy_table, "hybrid": hybrid_table}
    content = {f"few-{name}": make(results[name]) for name, make in tables.items() if name in results}
    readme = folder / "README.md"
    if readme.exists():
        readme.write_text(filled_if_known(readme.read_text(), content))
    if "pairs" in results:
        draw_pairs(folder / "pairs.png", results["pairs"])
    if "hybrid" in results:
        draw_hybrid(folder / "hybrid.png", results["hybrid"])


def filled_if_known(text: str, content: dict[str, str]) -> str:
    """`filled`, with the blocks of questions without an answer left empty."""
    blocks = {f"few-{name}": "" for name in ("pairs", "said", "noisy", "hybrid")}
    return filled(text, blocks | {name: f"{value}\n" for name, value in content.items()})
