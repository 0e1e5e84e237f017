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
    "vocabulary": "{:.0f}",
    "distinct_2": "{:.3f}",
    "novel": "{:.2f}",
    "mean_length": "{:.1f}",
}


def results_table(results: dict) -> str:
    settings, rbm = results["settings"], results["rbm"]
    lines = [
        f"| {results['images']:,} images of {results['dataset']} {results['split']} | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, system in results["systems"].items():
        lines.append(f"| {name} | " + " | ".join(form.format(system[key]) for key, form in COLUMNS.items()) + " |")
    cells = []
    for key in COLUMNS:
        entry = results["difference"].get(key)
        cells.append(f"{entry['difference']:+.1f} [{entry['low']:+.1f}, {entry['high']:+.1f}]" if entry else "")
    lines.append("| difference [95 % interval] | " + " | ".join(cells) + " |")
    rerank = f"re-rank of {rbm['rbm_rerank_candidates']} beams" if rbm["rbm_rerank"] else "no re-rank"
    lines += [
        "",
        f"{settings['num_beams']} beams, at most {settings['max_new_tokens']} new tokens, {results['references_per_image']} "
        f"references an image, COCO tokenization; novel: share of captions that no training image has. "
        f"BLIP-RBM: the same BLIP with guide (weight {rbm['rbm_guidance']:g}) and {rerank}, chosen on held-back training "
        "images. Intervals: paired bootstrap over images.",
    ]
    return "\n".join(lines)


def training_table(captioner: dict, rbm: dict, tuning: dict) -> str:
    best = max(captioner["held_back"], key=lambda entry: entry["eval_cider"])
    last = rbm["held_back"][-1]
    rerank = tuning["rerank"]
    rows = [
        ("captioner", f"{captioner['minutes']:.0f}", f"CIDEr-D {best['eval_cider']:.1f} on {captioner['data']['held_back']} held-back images"),
        ("RBM", f"{rbm['minutes']:.1f}", f"R@10 {last['image_to_text_r10']:.0f} image to text, {last['text_to_image_r10']:.0f} text to image, word AP {last['word_ap']:.2f}"),
        (
            "re-rank",
            "",
            f"first of the candidates {rerank['first_candidate']:.1f}, random {rerank['random_candidate']:.1f}, "
            f"chosen {rerank['best'][0][0]:.1f}, oracle {rerank['oracle']:.1f} CIDEr-D",
        ),
    ]  # fmt: skip
    lines = ["| stage | minutes | on held-back training images |", "|---|---|---|"]
    return "\n".join(lines + [f"| {stage} | {minutes} | {text} |" for stage, minutes, text in rows])


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
    return {
        "results": results_table(results),
        "training": training_table(read("captioner.json"), read("rbm.json"), read("tuning.json")),
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
        REPO / "model_card.md": card,
        CHECKPOINT / "README.md": card,
    }
    for copy in CHECKPOINT.glob("*.py"):
        files[copy] = (REPO / "modeling_blip_rbm" / copy.name).read_text()
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
