"""Memory of the RBM stage against the number of images: synthetic pairs, from encoding to a trained RBM.

    python -m benchmarks.scale --rows 6000 60000 --output benchmarks/results/scale.json

The tower is a one-layer ViT with random weights whose pooled output is as wide as that of the embedded model (1,408),
so that caching and training move as many numbers as they would there. "Anonymous" memory is what the process itself
holds; the peak also counts pages of memory-mapped files, which the system takes back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make_pairs(folder: Path, rows: int):
    """Noise images of 32 x 32 pixels with five captions each, as parquet."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from PIL import Image as PILImage

    words = "dog cat man woman boy girl ball grass beach snow red blue black white runs jumps sits plays".split()

    def pairs():
        rng = np.random.default_rng(0)
        for i in range(rows):
            captions = [" ".join(["a", *rng.choice(words, 8)]) for _ in range(5)]
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            yield {"image": PILImage.fromarray(pixels), "captions": captions, "image_id": str(i)}

    features = Features({"image": Image(), "captions": Sequence(Value("string")), "image_id": Value("string")})
    dataset = Dataset.from_generator(pairs, features=features, cache_dir=str(folder / "arrow"))
    # 200 rows a group, which is what a reader holds: as in Flickr8k's files
    dataset.to_parquet(folder / "train.parquet", batch_size=200)


def make_captioner(folder: Path):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, Dinov2Config

    from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor

    embedded = Path(__file__).resolve().parent.parent / "checkpoints" / "blip-rbm-small"
    processor = BlipRBMProcessor.from_pretrained(embedded)
    text = BlipConfig().text_config.to_dict() | {
        "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": processor.tokenizer.bos_token_id, "encoder_hidden_size": 32,
    }  # fmt: skip
    vision = Dinov2Config(hidden_size=704, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
    config = BlipRBMConfig(text_config=text, vision_config=vision.to_dict())
    model = BlipRBMForConditionalGeneration(config)
    assert isinstance(model, BlipForConditionalGeneration)
    model.save_pretrained(folder)
    BlipRBMProcessor(BlipImageProcessor(size={"height": 28, "width": 28}), processor.tokenizer).save_pretrained(folder)


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; the most anonymous and the most resident memory (MB) that it had, and its seconds."""
    start, most = time.time(), {"anonymous_mb": 0.0, "peak_mb": 0.0}
    running = subprocess.Popen(command)
    while running.poll() is None:
        try:
            status = Path(f"/proc/{running.pid}/status").read_text()
        except FileNotFoundError:
            break
        for name, key in (("anonymous_mb", "RssAnon"), ("peak_mb", "VmHWM")):
            found = [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key)]
            most[name] = max([most[name], *found])
        time.sleep(0.1)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return most | {"seconds": time.time() - start}


def run(work: Path, data: Path, streaming: bool, epochs: int) -> dict[str, float]:
    """The RBM stage on these data."""
    command = [sys.executable, "-m", "training.train_rbm", "--model", f"{work}/captioner", "--dataset", str(data)]
    way = "streamed" if streaming else "whole"
    command += ["--output_dir", f"{data}/{way}", "--cache_dir", f"{data}/cache-{way}"]
    command += ["--views", "1", "--held_back", "400"]
    command += ["--epochs", str(epochs), "--eval_every", str(epochs), "--num_words", "1000"]
    return watched([*command, "--streaming", str(streaming).lower()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[6000, 60000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as work:
        make_captioner(Path(work) / "captioner")
        for rows in args.rows:
            data = Path(work) / str(rows)
            data.mkdir()
            make_pairs(data, rows)
            for streaming in (False, True):
                name = f"{rows:,}{', streamed' * streaming}"
                results[name] = run(Path(work), data, streaming, args.epochs)
                print(name, {key: round(value) for key, value in results[name].items()}, flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({"epochs": args.epochs, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
