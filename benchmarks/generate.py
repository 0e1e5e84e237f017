"""Speed of `generate` beside transformers' own BLIP, with the same weights, in one process and one run.

    python -m benchmarks.generate --output benchmarks/results/generate.json

Two models: BLIP-base's shape at 384 px with random weights, converted by `from_blip`; and the embedded model, of which stock
BLIP has no such tower, so its decoder with transformers' own cache stands for stock. All contenders, of both precisions, run in turn;
every round gives a ratio, and their median is reported. 20 new tokens, no caption ends early. Tokens are compared in the same run.
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import BlipConfig, BlipForConditionalGeneration, DynamicCache, EncoderDecoderCache

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.linear_blip_rbm import packed_linears


REPO = Path(__file__).resolve().parent.parent
NEW_TOKENS = 20


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def cache_bytes(cache) -> int:
    parts = (cache.self_attention_cache, cache.cross_attention_cache)
    return sum(t.nbytes for part in parts for layer in part.layers for t in (layer.keys, layer.values))


class PeakMemory:
    """Megabytes that the process held at most inside, above what it held before: Linux' own count, memory given back before."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = self.kilobytes("VmRSS")
        return self

    def __exit__(self, *error):
        self.megabytes = (self.kilobytes("VmHWM") - self.before) * 1024 / 1e6

    @staticmethod
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Ours:
    def __init__(self, model, int8: bool = False, **settings):
        self.model, self.int8, self.settings = model, int8, settings

    def ready(self):
        return packed_linears(self.model, self.int8)  # as `generate` does, once for image and text

    def vision(self, pixels):
        return self.model.encode_image(pixels, rbm=self.settings.get("rbm", True))

    def decode(self, encoding, tokens, **kwargs):  # inside `ready`, whose packed weights `generate` leaves in place
        return self.model.generate(encoding=encoding, **length(tokens), **kwargs | self.settings)


class StockBLIP:
    def __init__(self, model):
        self.model = model

    def ready(self):
        return nullcontext()

    def vision(self, pixels):
        return self.model.vision_model(pixels)[0]

    def decode(self, embeds, tokens, **kwargs):
        """As `BlipForConditionalGeneration.generate` does after its vision model."""
        config = self.model.config.text_config
        ids = torch.full((len(embeds), 1), config.bos_token_id)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.model.text_decoder.generate(
            input_ids=ids, eos_token_id=config.sep_token_id, pad_token_id=config.pad_token_id,
            encoder_hidden_states=embeds, encoder_attention_mask=mask, **length(tokens), **kwargs,
        )  # fmt: skip


class StockCache(Ours):
    """Our model with transformers' cache: the image's keys and values repeated for every beam."""

    def decode(self, encoding, tokens, **kwargs):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return super().decode(encoding, tokens, past_key_values=cache, **kwargs)


def length(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


@torch.no_grad()
def compare(contenders: dict, pixels, pairs: int, **kwargs) -> list[dict]:
    """Seconds of vision, first token and whole decoding of each contender {(dtype, name): it}, all in turn; the first of a dtype is stock,
    the second ours with the RBM off. `ratio`, `against_first_dtype` and `against_off`: the seconds of stock in the same dtype, of stock in
    the first dtype and of ours with the RBM off, by those of the contender, round by round, medians."""
    seconds = {key: {"vision": [], "first_token": [], "decoding": []} for key in contenders}
    inputs = {dtype: pixels.to(getattr(torch, dtype)) for dtype, _ in contenders}
    tokens, cached, peak = {}, {}, {}
    for turn in range(pairs + 1):
        for key, contender in contenders.items():
            start = time.perf_counter()
            with contender.ready():
                image, vision = contender.vision(inputs[key[0]]), time.perf_counter() - start
                _, first = timed(contender.decode, image, 1, **kwargs)
                output, decoding = timed(contender.decode, image, NEW_TOKENS, return_dict_in_generate=True, **kwargs)
            tokens[key] = output.sequences
            cached[key] = cache_bytes(output.past_key_values)
            if turn:  # the first turn warms up
                for part, value in zip(("vision", "first_token", "decoding"), (vision, first, decoding)):
                    seconds[key][part].append(value)
    for key, contender in contenders.items():
        with PeakMemory() as peak[key], contender.ready():
            contender.decode(contender.vision(inputs[key[0]]), NEW_TOKENS, **kwargs)
    total = {key: [v + d for v, d in zip(s["vision"], s["decoding"])] for key, s in seconds.items()}
    ratio = lambda of, to: statistics.median(o / t for o, t in zip(of, to))
    first_two = {dtype: [key for key in contenders if key[0] == dtype][:2] for dtype in inputs}
    rows = []
    for (dtype, name), parts in seconds.items():
        key, (stock, off) = (dtype, name), first_two[dtype]
        rows.append(
            {
                "dtype": dtype,
                "contender": name,
                "images_per_second": len(pixels) / statistics.median(total[key]),
                **{part: statistics.median(values) for part, values in parts.items()},
                "ratio": ratio(total[stock], total[key]),
                "decoding_ratio": ratio(seconds[stock]["decoding"], parts["decoding"]),
                "against_first_dtype": ratio(total[next(iter(contenders))], total[key]),
                "against_off": ratio(total[off], total[key]),
                "same_tokens": torch.equal(tokens[stock], tokens[key]),
                "cache_megabytes": cached[key] / 1e6,
                "peak_megabytes": peak[key].megabytes,
            }
        )
    return rows


def blip_base(dtype, rbm_words: int = 1000):
    torch.manual_seed(0)
    config = BlipConfig(vision_config={"image_size": 384}, text_config={"is_decoder": True, "num_attention_heads": 12})
    config.vision_config.initializer_range = 0.02
    stock = BlipForConditionalGeneration(config).to(dtype).eval()
    words = list(range(2000, 2000 + rbm_words))
    ours = BlipRBMForConditionalGeneration.from_blip(stock, rbm_word_ids=words, rbm_cause_tokens=4)
    contenders = {"stock BLIP": StockBLIP(stock), "BLIP-RBM, RBM off": Ours(ours, rbm=False)}
    ours.rbm_layer.rbm.word_weight.data.normal_(0, 0.2)
    ours.rbm_layer.gate.data.fill_(0.1)
    contenders["BLIP-RBM, refine and guide"] = Ours(ours, rbm_guidance=0.1, rbm_rerank=False)
    contenders["BLIP-RBM, RBM off, 8 bits"] = Ours(ours, int8=True, rbm=False)
    return contenders | reranked(ours), 384


def reranked(model) -> dict:
    """Re-rank of 10 sampled candidates, which needs no beams; beside the others with 3."""
    return {"BLIP-RBM, best of 10 samples": Ours(model, do_sample=True, num_beams=1, rbm_guidance=0.1, rbm_rerank=True)}


def embedded(dtype):
    model = BlipRBMForConditionalGeneration.from_pretrained(REPO / "checkpoints" / "blip-rbm-small").to(dtype).eval()
    contenders = {
        "stock cache": StockCache(model, rbm=False),
        "BLIP-RBM, RBM off": Ours(model, rbm=False),
        "BLIP-RBM, guide on": Ours(model, rbm_rerank=False),
        "BLIP-RBM, RBM off, 8 bits": Ours(model, int8=True, rbm=False),
        "BLIP-RBM, best of 10 beams": Ours(model),
    }
    return contenders | reranked(model), 260


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "blip_base"], choices=["embedded", "blip_base"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    rows = []
    names = ("contender", "images_per_second", "vision", "decoding", "ratio", "against_first_dtype", "against_off")
    print("| model | dtype | batch | beams | " + " | ".join(names) + " | same tokens | cache MB | peak MB |")
    print("|---" * (len(names) + 7) + "|")
    cells = [(m, b, n) for m in args.models for b in args.batches for n in args.beams]
    loaded = None
    for model, batch, beams in tqdm(cells, desc="generate"):
        if loaded != model:
            make = {"embedded": embedded, "blip_base": blip_base}[model]
            made = {dtype: make(getattr(torch, dtype)) for dtype in args.dtypes}
            contenders = {(d, name): c for d, (of_dtype, _) in made.items() for name, c in of_dtype.items()}
            loaded, size = model, made[args.dtypes[0]][1]
        pixels = torch.randn(batch, 3, size, size)
        among = {key: c for key, c in contenders.items() if beams > 1 or "best of" not in key[1]}
        for entry in compare(among, pixels, args.pairs, num_beams=beams, do_sample=False):
            rows.append({"model": model, "batch": batch, "beams": beams, **entry})
            numbers = " | ".join(f"{entry[name]:.2f}" for name in names[1:])
            print(
                f"| {model} | {entry['dtype']} | {batch} | {beams} | {entry['contender']} | {numbers} | {entry['same_tokens']} | "
                f"{entry['cache_megabytes']:.0f} | {entry['peak_megabytes']:.0f} |",
                flush=True,
            )
        if args.output:  # after every cell: a run of an hour that is stopped has lost nothing
            settings = vars(args) | {"threads": torch.get_num_threads(), "new_tokens": NEW_TOKENS}
            Path(args.output).write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
