"""The frozen vision tower's output, computed once and memory-mapped ever after.

    python -m training.lib.features --vision google/efficientnet-b2 --dataset flickr8k --split train --views 4

A cache entry is a folder `<cache_dir>/<key>/` of shards `00000.npy`, ... (images, views, N, C) in fp16, or (images,
views, V) if they are pooled, and `index.json`: their rows and checksums, and what they were computed from. The key is a
hash of everything that the numbers depend on: tower weights, image processor, image bytes, views, pooling. So an entry
is reused by whichever stage asks for the same thing, and never used for another. A shard is written under a name of its
process and renamed, so that processes may encode the same images at once; one that is missing or damaged is computed
again, the others are not.
"""

import argparse
import copy
import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_blip_rbm.inference_blip_rbm import fast_tower, image_tokens
from modeling_blip_rbm.vision_blip_rbm import pool_tokens
from training.lib.arguments import bf16_is_fast
from training.lib.checkpoints import checksum, whole_file, write_json
from training.lib.data import image_view, images_fingerprint
from training.lib.distributed import own_processes
from training.lib.mixture import DataSource, image_sources, join_parts, without_excluded
from training.lib.pairs import PairStream, load_pairs, read_pairs


SHARD_BYTES, SHARD_ROWS = 2**26, 1024  # at most: what a stop loses, and what damage costs


def tower_fingerprint(tower: torch.nn.Module) -> str:
    """Hash of the tower's parameters and buffers by name (fp16, the precision in which features are kept)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        if tensor.is_floating_point():  # counters such as num_batches_tracked change nothing in the output
            digest.update(name.encode())
            half = tensor.detach().cpu().to(torch.float16) + 0.0  # -0 and 0 are the same weight, but not the same bytes
            digest.update(half.contiguous().numpy().tobytes())
    return digest.hexdigest()


class FeatureStore(torch.utils.data.Dataset):
    """Cached tower outputs by row number: `store[i]` is (views, N, C), `store.view(i, v)` is (N, C), fp16 arrays;
    pooled: V for N, C."""

    def __init__(self, folder: Path, index: Optional[dict] = None):
        self.folder = Path(folder)
        self.index = index or read_index(self.folder)
        self.shards = [np.load(self.folder / shard["file"], mmap_mode="r") for shard in self.index["shards"]]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    @classmethod
    def joined(cls, stores: list["FeatureStore"]) -> "FeatureStore":
        """The rows of several stores, one store after the other."""
        joined = copy.copy(stores[0])
        joined.shards = [shard for store in stores for shard in store.shards]
        joined.starts = np.cumsum([0, *(len(shard) for shard in joined.shards)])
        return joined

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.shards[0].shape[1:]

    @property
    def num_views(self) -> int:
        return self.shape[1]

    def __getitem__(self, row: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[shard][row - self.starts[shard]]

    def view(self, row: int, view: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.array(self[row][view]))

    def batch(self, rows, view=0) -> torch.Tensor:
        """(len(rows), N, C) fp32. `view`: one for all rows, or one of each."""
        views = np.broadcast_to(view, len(rows))
        return torch.from_numpy(np.stack([self[int(row)][v] for row, v in zip(rows, views)]).astype(np.float32))

    def captions(self) -> Dataset:
        """Captions and ids of the images of a stream, which are kept beside the features."""
        files = [str(self.folder / shard["pairs"]) for shard in self.index["shards"]]
        return Dataset.from_json(files, cache_dir=str(self.folder / "arrow"))


@torch.no_grad()
def cache_features(
    tower: torch.nn.Module,
    image_processor,
    dataset: Dataset | PairStream,
    cache_dir: str | Path,
    views: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "float32",
    pooling: Optional[str] = None,
) -> FeatureStore:
    """Encode every image of `dataset` in `views` views, or find that it has been done.

    Args:
        dtype: in which the tower computes: "float32", "bfloat16" (autocast), or "auto": that of what is cached already,
            else whichever is faster on this processor. Features are kept in fp16 either way.
        pooling: keep `pool_tokens` of each view only, which is all that an RBM needs. None, "tokens": keep the tokens.

    Raises:
        OSError: if the disk is too small, with what is needed and what is free. What was encoded stays.
    """
    preprocessing = json.loads(image_processor.to_json_string())
    for bookkeeping in ("auto_map", "processor_class"):  # written or not, depending on where it was saved
        preprocessing.pop(bookkeeping, None)
    settings = {
        "tower": tower_fingerprint(tower),
        "image_processor": preprocessing,
        "images": dataset.fingerprint if isinstance(dataset, PairStream) else images_fingerprint(dataset),
        "views": views,
        "seed": seed,
        "pooling": None if pooling == "tokens" else pooling,
    }
    settings["dtype"] = automatic_dtype(cache_dir, settings) if dtype == "auto" else dtype
    writer = FeatureWriter(cache_dir, settings)
    if not writer.complete:
        tokens = FeatureWriter(cache_dir, settings | {"pooling": None})  # what another stage may have computed already
        encoder = Encoder(
            tower,
            image_processor,
            settings,
            batch_size,
            FeatureStore(tokens.folder, tokens.index) if tokens.complete else None,
        )
        writer.write(encoder, dataset)
    return FeatureStore(writer.folder, writer.index)  # not the file: a process that encodes the same may be behind


def entry(cache_dir: str | Path, settings: dict) -> tuple[Path, dict]:
    """The folder of the features of these settings, and its index: {} if nothing was encoded yet."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / key
    return folder, read_index(folder)


def read_index(folder: Path) -> dict:
    """The index of a cache entry; {} if there is none, or if it is damaged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        whole = "dtype" in index["settings"] and all(
            shard["file"] == f"{number:05}.npy" and isinstance(shard["rows"], int) and isinstance(shard["crc32"], int)
            for number, shard in enumerate(index["shards"])
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return index if whole else {}


def automatic_dtype(cache_dir: str | Path, settings: dict) -> str:
    """Which is faster differs between two machines that share a cache: what is there already decides first."""
    for pooling in (settings["pooling"], None):
        indices = [
            entry(cache_dir, settings | {"dtype": dtype, "pooling": pooling})[1] for dtype in ("float32", "bfloat16")
        ]
        furthest = max(indices, key=lambda index: (index.get("finished", False), len(index.get("shards", []))))
        if furthest.get("shards"):
            return furthest["settings"]["dtype"]
    return "bfloat16" if bf16_is_fast() else "float32"


class FeatureWriter:
    """A cache entry in the making: which shards are whole, and the computation of those that are not."""

    def __init__(self, cache_dir: str | Path, settings: dict):
        self.settings = settings
        self.folder, index = entry(cache_dir, settings)
        self.index_file = self.folder / "index.json"
        self.shards: list[dict] = index.get("shards", [])
        self.finished = index.get("finished", False)  # the end of the images has been reached
        self.dropped = index.get("dropped", {})  # by a stream
        self.broken = [number for number, shard in enumerate(self.shards) if not self.is_whole(shard)]
        for number in self.broken:
            print(f"{self.folder / self.shards[number]['file']} is missing or damaged: encoding its images again")

    def is_whole(self, shard: dict) -> bool:
        files = [(shard["file"], shard["crc32"])] + (
            [(shard["pairs"], shard["pairs_crc32"])] if "pairs" in shard else []
        )
        return all((self.folder / name).exists() and checksum(self.folder / name) == crc for name, crc in files)

    @property
    def complete(self) -> bool:
        return self.finished and not self.broken

    @property
    def index(self) -> dict:
        names = ("shards", "finished", "dropped", "settings")
        return {name: getattr(self, name) for name in names}

    def write(self, encoder: "Encoder", dataset: Dataset | PairStream):
        """Compute the broken shards, then those that are still to come."""
        starts = np.cumsum([0, *(shard["rows"] for shard in self.shards)]).tolist()
        known = len(dataset) if isinstance(dataset, Dataset) else None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.index_file.exists() and not self.shards:
            print(f"{self.index_file} is damaged: encoding its images again")
        with tqdm(total=known, desc=f"encode images x {self.settings['views']} views") as bar:
            bar.update(starts[-1] - sum(self.shards[number]["rows"] for number in self.broken))
            for number in self.broken:
                rows = islice(rows_from(dataset, starts[number]), self.shards[number]["rows"])
                self.write_shard(number, *encoder.encode(rows, starts[number], bar), dataset)
            if not self.finished:
                self.go_on(encoder, dataset, starts[-1], bar)
        self.broken = []

    def go_on(self, encoder, dataset, start: int, bar):
        rows = rows_from(dataset, start)
        limit = None
        while True:
            limit = limit or encoder.rows_per_shard(dataset)
            pairs, features = encoder.encode(islice(rows, limit), start, bar)
            if pairs:
                self.check_space(features, bar)
                self.write_shard(len(self.shards), pairs, features, dataset)
                start += len(pairs)
            if len(pairs) < limit or start == bar.total:
                break
        if not self.shards:
            raise ValueError(f"there is no image to encode in {dataset}")
        self.finished, self.dropped = True, dict(getattr(dataset, "dropped", {}))
        self.write_index()

    def check_space(self, features: np.ndarray, bar):
        left = 1 if bar.total is None else (bar.total - bar.n) / len(features) + 1
        needed, free = int(features.nbytes * left), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"features of the images still to encode take {needed / 2**20:,.0f} MB, but {self.folder} has "
                f"{free / 2**20:,.0f} MB left: give another --cache_dir, or fewer --views. What was "
                "encoded so far is kept",
            )

    def write_shard(self, number: int, pairs: list[dict], features: np.ndarray, dataset):
        entry = {"file": f"{number:05}.npy", "rows": len(features)}
        with whole_file(self.folder / entry["file"]) as temporary:
            with temporary.open("wb") as file:
                np.save(file, features)
            entry["crc32"] = checksum(temporary)
        if isinstance(dataset, PairStream):
            entry["pairs"] = f"{number:05}.jsonl"
            with whole_file(self.folder / entry["pairs"]) as temporary:
                temporary.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
                entry["pairs_crc32"] = checksum(temporary)
        self.shards[number : number + 1] = [entry]
        self.write_index()

    def write_index(self):
        write_json(self.index_file, self.index)


def rows_from(dataset: Dataset | PairStream, start: int) -> Iterator[dict]:
    """Rows {image, captions, image_id} from number `start` on."""
    if isinstance(dataset, Dataset):
        return (dataset[row] for row in range(start, len(dataset)))
    return islice(iter(dataset), start, None)


class Encoder:
    """Images through the tower, in batches.

    Args:
        tokens: the same features, not pooled, where they exist: they are pooled then, and nothing is encoded.
    """

    def __init__(self, tower, image_processor, settings: dict, batch_size: int, tokens: Optional[FeatureStore] = None):
        self.device = next(tower.parameters()).device
        # the packed weights of a fast tower do not take what autocast makes of their inputs
        packs = any(isinstance(module, torch.nn.Linear) for module in tower.modules())
        self.tower = tower if packs and settings["dtype"] != "float32" else fast_tower(tower)
        self.image_processor, self.settings = image_processor, settings
        self.tokens = tokens
        self.images_per_batch = max(1, batch_size // settings["views"])

    @torch.no_grad()
    def features(self, images: list, first_row: int) -> np.ndarray:
        """(images, views, N, C) or (images, views, V), fp16."""
        if self.tokens is not None:
            rows = np.stack([self.tokens[first_row + i] for i in range(len(images))]).astype(np.float32)
            pooled = pool_tokens(torch.from_numpy(rows).flatten(0, 1), self.settings["pooling"])
            return pooled.view(*rows.shape[:2], -1).to(torch.float16).numpy()
        views, dtype = self.settings["views"], getattr(torch, self.settings["dtype"])
        seed = self.settings["seed"] + first_row
        looks = [image_view(image.convert("RGB"), v, seed + i) for i, image in enumerate(images) for v in range(views)]
        pixel_values = self.image_processor(looks, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            tokens = image_tokens(self.tower, pixel_values.contiguous(memory_format=torch.channels_last)).float()
        if self.settings["pooling"] is not None:
            tokens = pool_tokens(tokens, self.settings["pooling"])
        return tokens.reshape(len(images), views, *tokens.shape[1:]).to(torch.float16).cpu().numpy()

    def rows_per_shard(self, dataset) -> int:
        image = next(rows_from(dataset, 0), None)
        if image is None:
            return 1
        return min(SHARD_ROWS, max(1, SHARD_BYTES // self.features([image["image"]], 0).nbytes))

    def encode(self, rows: Iterable[dict], start: int, bar) -> tuple[list[dict], Optional[np.ndarray]]:
        """What is kept of the rows beside their images, and the features; `start` is the first image's number."""
        pairs, features = [], []
        rows = iter(rows)
        while batch := list(islice(rows, self.images_per_batch)):
            features.append(self.features([row["image"] for row in batch], start + len(pairs)))
            pairs += [{"image_id": row["image_id"], "captions": row["captions"]} for row in batch]
            bar.update(len(batch))
        return pairs, np.concatenate(features) if features else None


def load_features(
    data, tower, image_processor, split: Optional[str] = None, card_file: Optional[Path] = None, **settings
) -> tuple[Dataset, FeatureStore]:
    """The pairs (`captions`, `image_id`) that the arguments of a stage name, and the features of their images.

    Args:
        data: `DataArguments`; with `streaming` no image is ever kept, so that the data may be larger than the disk. Of
            several data sets the rows follow one another, see `training/lib/mixture.py`.
        card_file: where the card of what was read and dropped is saved, as JSON; it is printed in any case.
        settings: of `cache_features`.
    """
    settings = {"cache_dir": data.cache_dir, "views": data.views, "dtype": data.encode_dtype} | settings
    split = split or data.train_split
    sources = image_sources(data)
    if not sources:
        raise ValueError("--dataset names texts alone, but this stage needs images")
    parts, stores, cards = [], [], []
    for source in sources:
        part, card = (streamed if data.streaming else loaded)(source, data, split)
        stores.append(cache_features(tower, image_processor, part, **settings))
        if data.streaming:
            part, dropped = stores[-1].captions(), stores[-1].index["dropped"]
            card |= {"images": len(part), "dropped": dropped}
            print(
                f"{source.path} ({split}, streamed): {len(part):,} images, {sum(map(len, part['captions'])):,} captions; "
                f"dropped {dropped or 'none'}"
            )
        parts.append(part)
        cards.append(card)
    if card_file is not None:
        write_json(card_file, cards[0] if len(cards) == 1 else cards)
    return join_parts(parts), stores[0] if len(stores) == 1 else FeatureStore.joined(stores)


def loaded(source: DataSource, data, split: str) -> tuple[Dataset, dict]:
    """The pairs of one data set, and the card of what was read and dropped."""
    dataset, card = read_pairs(source.path, split, **data.columns)
    print(card)
    dataset = without_excluded(dataset, source)
    if data.max_images is not None:
        dataset = dataset.select(range(min(data.max_images, len(dataset))))
    return dataset, asdict(card)


def streamed(source: DataSource, data, split: str) -> tuple[PairStream, dict]:
    if source.without is not None:
        raise ValueError(f"--dataset {source.path}: a stream takes no `without`: leave --streaming out")
    stream = PairStream(source.path, split, data.max_images, **data.columns)
    return stream, {"source": stream.path, "split": split}


def main():
    from training.lib.encoders import load_image_processor, load_vision_model  # which imports this file

    parser = argparse.ArgumentParser(description="Cache the outputs of a frozen vision tower.")
    parser.add_argument("--vision", required=True, help="folder or Hub id of a vision model")
    parser.add_argument("--dataset", required=True, help="folder or Hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--views", type=int, default=1, help="1 plain, 2 with the mirror image, more: random crops")
    parser.add_argument("--cache_dir", default="runs/features")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="float32")
    parser.add_argument("--pooling", choices=("mean", "cls_mean", "mean_max"), help="keep the pooled image only")
    args = parser.parse_args()
    tower, processor = load_vision_model(args.vision).to(own_processes().device), load_image_processor(args.vision)
    dataset = load_pairs(args.dataset, args.split)
    settings = {"dtype": args.dtype, "pooling": args.pooling}
    store = cache_features(tower, processor, dataset, args.cache_dir, args.views, args.batch_size, **settings)
    print(f"{store.folder}: {store.shape}")


if __name__ == "__main__":
    main()
