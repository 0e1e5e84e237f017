"""Last stage: put a model on the Hub, as `AutoModel.from_pretrained(..., trust_remote_code=True)` reads it.

    python -m training.publish --model runs/blip-rbm-small --repo_id me/blip-rbm-small --dry_run
    python -m training.publish --model runs/blip-rbm-small --repo_id me/blip-rbm-small --private

Stages the repo in `--staging`: weights, configs, processor, the model's code flat beside them, a model card. Then loads it in a
process of its own in which this package cannot be imported, and captions an image. Only what passes is uploaded.
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


PACKAGE = Path(__file__).resolve().parent.parent / "modeling_blip_rbm"
KEPT = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "processor_config.json")
KEPT += ("preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.txt", "results.json", "README.md")

CARD = """---
{data}
---

# {name}

BLIP-RBM: [BLIP](https://arxiv.org/abs/2201.12086) with a restricted Boltzmann machine between its vision encoder and its text decoder.
It captions images; the RBM guides the words, and chooses among candidate captions.

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
    """Lay the repo out in `staging`; the names of its files.

    Raises:
        ValueError: if `model` holds no BLIP-RBM, or `staging` something else than an earlier staging.
    """
    model, staging = Path(model), Path(staging)
    config = model / "config.json"
    if not config.exists() or json.loads(config.read_text()).get("model_type") != "blip_rbm":
        raise ValueError(f"{model} holds no BLIP-RBM: its config.json is missing or of another model")
    if not list(model.glob("*.safetensors")):
        raise ValueError(f"{model} holds no weights (*.safetensors)")
    if staging.exists() and any(staging.iterdir()) and not (staging / "modeling_blip_rbm.py").exists():
        raise ValueError(f"{staging} holds something else: give an empty folder, or leave --staging out")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for file in sorted({file for pattern in KEPT for file in model.glob(pattern)}):
        shutil.copy2(file, staging)
    for code in PACKAGE.glob("*.py"):
        if code.name not in ("__init__.py", "__main__.py"):
            shutil.copy2(code, staging)
    if not (staging / "README.md").exists():
        (staging / "README.md").write_text(card_of(staging, repo_id))
    return sorted(file.name for file in staging.iterdir())


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
    """Create the repo (and the branch) if need be, and upload; the commit's URL. Token and endpoint as huggingface_hub finds them."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = (
        f"BLIP-RBM {json.loads((Path(staging) / 'config.json').read_text()).get('transformers_version', '')}".strip()
    )
    return api.upload_folder(
        repo_id=repo_id, folder_path=staging, revision=revision, commit_message=message
    ).commit_url  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained BLIP-RBM")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--staging", help="where the repo is laid out; default: <model>-hub")
    parser.add_argument("--image", help="image that the check captions; default: a drawing")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--dry_run", action="store_true", help="stage and check, upload nothing")
    args = parser.parse_args()
    staging = args.staging or args.model.rstrip("/") + "-hub"
    files = stage(args.model, staging, args.repo_id)
    size = sum((Path(staging) / name).stat().st_size for name in files)
    print(f"{staging}: {len(files)} files, {size / 1e6:.1f} MB: {', '.join(files)}")
    print(f"loads in a clean process: {json.dumps(check(staging, args.image))}")
    if args.dry_run:
        print("dry run: nothing uploaded")
    else:
        print(upload(staging, args.repo_id, args.private, args.revision))


if __name__ == "__main__":
    main()
