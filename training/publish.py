"""Last stage: put a model on the Hub, as `AutoModel.from_pretrained(..., trust_remote_code=True)` reads it.

    python -m training.publish --model runs/blip-rbm-small --repo_id me/blip-rbm-small --dry_run
    python -m training.publish --model runs/blip-rbm-small --repo_id me/blip-rbm-small --private

Stages the repo in `--staging`: weights, configs, processor, the model's code flat beside them, a model card; these
files by name, and nothing else of the model's folder. Then loads it in a process of its own in which this package
cannot be imported, and captions an image. Only what passes is uploaded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCardData
from PIL import Image, ImageDraw

from modeling_blip_rbm.configuration_blip_rbm import HUB_FILES
from training.lib.checkpoints import checksum, kind_of_model, whole_folder, write_json
from training.lib.stage import run_stage


PACKAGE = Path(__file__).resolve().parent.parent / "modeling_blip_rbm"
FILES = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json")
FILES += (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "results.json",
    "README.md",
)
MARKER = ".blip-rbm-staging.json"  # in a staging folder only, never uploaded: {name: CRC-32} of what `stage` wrote

CARD = """---
{data}
---

# {name}

BLIP-RBM: [BLIP](https://arxiv.org/abs/2201.12086) with a restricted Boltzmann machine between its vision encoder and
its text decoder. It captions images; the RBM guides the words, and chooses among candidate captions.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = processor(images="photo.jpg")
print(processor.captions(model.generate(**inputs)))
```

{results}"""

CHECK = """
import importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
folder, image, package = sys.argv[1:]
sys.path = [p for p in sys.path if p not in ("", package)]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("modeling_blip_rbm") is None, "the check must not see the installed package"
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
caption = processor.captions(model.generate(**processor(images=image)))[0]
again = pipeline("image-to-text", model=folder, trust_remote_code=True)(image)[0]["generated_text"]
assert caption == again, (caption, again)
print(json.dumps({"class": type(model).__name__, "caption": caption}))
"""


def card_of(folder: Path, repo_id: str) -> str:
    """A model card with the numbers of `results.json`, if the folder has one."""
    file, name = folder / "results.json", repo_id.split("/")[-1]
    results, metrics, text = json.loads(file.read_text()) if file.exists() else None, None, "It was not evaluated."
    if results:
        systems = results["systems"]
        shown = ("CIDEr-D", "BLEU-4", "ROUGE-L")
        metrics = [
            EvalResult(
                task_type="image-text-to-text",
                task_name="image captioning",
                dataset_type=results["dataset"],
                dataset_name=f"{results['dataset']}, {results['images']} images of {results['split']}",
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=round(systems["BLIP-RBM"][metric], 1),
            )
            for metric in shown
        ]
        rows = [
            f"| {name} | " + " | ".join(f"{system[m]:.1f}" for m in shown) + " |" for name, system in systems.items()
        ]
        head = f"On {results['images']} images of {results['dataset']} ({results['split']}):"
        text = "\n".join([head, "", "| | " + " | ".join(shown) + " |", "|---" * 4 + "|", *rows, ""])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["image-to-text", "image-captioning", "blip", "restricted-boltzmann-machine", "custom_code"],
        model_name=name,
        eval_results=metrics,
    )
    return CARD.format(data=data.to_yaml(), name=name, repo_id=repo_id, results=text)


def stage(model: str | Path, staging: str | Path, repo_id: str) -> list[str]:
    """Lay the repo out in `staging`: built beside it, then put in its place.

    Returns:
        The names of its files, without the marker by which a staging folder is known.

    Raises:
        ValueError: if `model` holds no whole BLIP-RBM, or a link where a file should be; if `staging` overlaps the
            model or this package, or holds anything that an earlier staging did not write. Nothing was changed then.
    """
    model, staging = Path(model).resolve(), Path(staging).resolve()
    if not (model / "config.json").is_file() or kind_of_model(model) != "blip_rbm":
        raise ValueError(f"{model} holds no BLIP-RBM: its config.json is missing, unreadable or of another model")
    files = [model / name for name in FILES if os.path.lexists(model / name)]
    files += weights_of(model)
    refuse_irregular(*files)
    refuse_overlap(staging, model)
    refuse_others_folder(staging)
    with whole_folder(staging) as new:
        for file in [*files, *(PACKAGE / name for name in HUB_FILES)]:
            shutil.copyfile(file, new / file.name)
        if not (new / "README.md").exists():
            try:
                (new / "README.md").write_text(card_of(new, repo_id))
            except (KeyError, TypeError) as error:
                found = f"{model / 'results.json'} is not what training.evaluate_captions writes ({error!r})"
                raise ValueError(f"{found}: remove it, or evaluate the model again") from error
        staged = {file.name: checksum(file) for file in sorted(new.iterdir())}
        write_json(new / MARKER, staged)
    return list(staged)


def weights_of(model: Path) -> list[Path]:
    """The weight files that transformers loads from a folder.

    Raises:
        ValueError: if there are none, or the index names one that is not there, or not in this folder.
    """
    single, index = model / "model.safetensors", model / "model.safetensors.index.json"
    if os.path.lexists(single) or not os.path.lexists(index):
        names = [single.name]
    else:
        refuse_irregular(index)
        try:
            names = [index.name, *sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} cannot be read ({error}): save the model again") from error
    missing = [name for name in names if Path(name).name != name or not os.path.lexists(model / name)]
    if missing:
        raise ValueError(f"{model} lacks weights: no {', '.join(missing[:3])}")
    return [model / name for name in names]


def refuse_irregular(*files: Path) -> None:
    """Stop at a link, whose target may be anything, and at a pipe, which would be waited for."""
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{file} is no regular file, so it is not published: put a copy in its place")


def refuse_overlap(staging: Path, model: Path) -> None:
    for other in (model, PACKAGE):
        if staging == other or staging in other.parents or other in staging.parents:
            raise ValueError(f"--staging {staging} overlaps {other}: nothing was changed; give a folder apart from it")


def refuse_others_folder(staging: Path) -> None:
    """Stop if a folder holds what `stage` did not write, or what was changed since."""
    if not staging.exists():
        return
    if not staging.is_dir():
        raise ValueError(f"--staging {staging} is a file: nothing was changed; give a new folder")
    try:
        staged = dict(json.loads((staging / MARKER).read_text() if (staging / MARKER).is_file() else "{}"))
    except (OSError, ValueError, TypeError):
        staged = {}
    found = {file.name: file for file in staging.iterdir() if file.name != MARKER}
    others = sorted(name for name, file in found.items() if not file.is_file() or staged.get(name) != checksum(file))
    if others:
        raise ValueError(
            f"--staging {staging} holds what publish did not write, or what was changed since "
            f"({', '.join(others[:4])}): nothing was changed; give a new folder. "
            "What is to be published belongs into --model"
        )


def check(staging: str | Path, image: str | Path | None = None) -> dict:
    """Load the staged repo in a clean process and caption an image.

    Raises:
        RuntimeError: with what went wrong there.
    """
    with tempfile.TemporaryDirectory() as folder:
        if image is None:
            image = Path(folder) / "drawing.png"
            picture = Image.new("RGB", (224, 224), "skyblue")
            ImageDraw.Draw(picture).ellipse((60, 60, 160, 160), fill="red")
            picture.save(image)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder) / "modules")}
        command = [
            sys.executable,
            "-c",
            CHECK,
            str(Path(staging).resolve()),
            str(Path(image).resolve()),
            str(PACKAGE.parent),
        ]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the staged repo in {staging} does not load by itself:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def upload(staging: str | Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Create the repo (and the branch) if need be, and upload; the commit's URL. Token and endpoint are those of
    huggingface_hub."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = (
        f"BLIP-RBM {json.loads((Path(staging) / 'config.json').read_text()).get('transformers_version', '')}".strip()
    )
    return api.upload_folder(
        repo_id=repo_id, folder_path=staging, revision=revision, commit_message=message, ignore_patterns=[MARKER]
    ).commit_url


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained BLIP-RBM")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--staging", help="where the repo is laid out; default: <model>-hub")
    parser.add_argument("--image", help="image that the check captions; default: a drawing")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--dry_run", action="store_true", help="stage and check, upload nothing")
    return parser.parse_args()


def main():
    args = parse_args()
    staging = args.staging or args.model.rstrip("/") + "-hub"
    files = stage(args.model, staging, args.repo_id)
    size = sum((Path(staging) / name).stat().st_size for name in files)
    print(f"{staging}: {len(files)} files, {size / 1e6:.1f} MB: {', '.join(files)}")
    try:
        print(f"loads in a clean process: {json.dumps(check(staging, args.image))}")
    except RuntimeError as error:  # its last line says what is wrong with the model; BLIP_RBM_DEBUG=1 shows all
        first, *_, last = str(error).splitlines()
        raise ValueError(f"{first} {last}") from error
    if args.dry_run:
        print("dry run: nothing uploaded")
    else:
        print(upload(staging, args.repo_id, args.private, args.revision))


if __name__ == "__main__":
    run_stage(main)
