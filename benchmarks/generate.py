"""Speed of `generate` beside transformers' own BLIP, with the same weights, in turn, in one run.

    python -m benchmarks.generate --output benchmarks/results/generate.json

Two models: BLIP-base's shape at 384 px with random weights, converted by `from_blip`; and the embedded model, of which stock
BLIP has no such tower, so its decoder with transformers' own cache stands for stock. All contenders, of both precisions, run in turn;
every round gives a ratio, and their median is reported. 20 new tokens, no caption ends early. Tokens are compared in the same run.

Each contender waits for its turn in a process of its own, as a user has it: large tensors come from the system, a page at a time, or from
what the process has freed before, and a quarter of stock's time depends on what others have left there (docs/experiments.md).
"""

import argparse
import ctypes
import gc
import platform
import re
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing as multiprocessing
from tqdm.auto import tqdm
from transformers import BlipConfig, BlipForConditionalGeneration, DynamicCache, EncoderDecoderCache

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from training.lib.checkpoints import write_json


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
        self.model, self.settings = model, settings
        model.optimize_for_inference(int8)

    def vision(self, pixels):
        return self.model.encode_for_generation(pixels, rbm=self.settings.get("rbm", True))

    def decode(self, encoding, tokens, **kwargs):
        return self.model.generate(encoding=encoding, **length(tokens), **kwargs | self.settings)


class StockBLIP:
    def __init__(self, model):
        self.model = model

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


def processor() -> str:
    """Its name, and what its vectors and matrix units are, as far as PyTorch uses them."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    units = torch.backends.cpu.get_cpu_capability() + (", AMX" if torch.cpu._is_amx_tile_supported() else "")
    return f"{name[1] if name else platform.processor()} ({units})"


def length(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


@torch.no_grad()
def serve(connection, folders: dict[type, Path], model: str, dtype: str, name: str):
    """A contender in a process of its own: asked for (images, beams, whether to measure memory), it answers with `measured`."""
    contender, settings = CONTENDERS[model][name]
    architecture = BlipForConditionalGeneration if contender is StockBLIP else BlipRBMForConditionalGeneration
    loaded = architecture.from_pretrained(folders[architecture], dtype=getattr(torch, dtype)).eval()
    contender, size = contender(loaded, **settings), IMAGE_SIZE[model]
    connection.send("ready")
    while (request := connection.recv()) is not None:
        batch, beams, memory = request
        pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
        connection.send(measured(contender, pixels.to(loaded.dtype), memory, num_beams=beams, do_sample=False))


def measured(contender, pixels, memory: bool, **kwargs) -> dict:
    """Seconds of vision, first token and whole decoding, with the tokens and the bytes of the cache; or peak megabytes."""
    if memory:
        with PeakMemory() as peak:
            contender.decode(contender.vision(pixels), NEW_TOKENS, **kwargs)
        return {"peak_megabytes": peak.megabytes}
    start = time.perf_counter()
    image, vision = contender.vision(pixels), time.perf_counter() - start
    _, first = timed(contender.decode, image, 1, **kwargs)
    output, decoding = timed(contender.decode, image, NEW_TOKENS, return_dict_in_generate=True, **kwargs)
    seconds = {"vision": vision, "first_token": first, "decoding": decoding}
    return {"seconds": seconds, "tokens": output.sequences.tolist(), "cache": cache_bytes(output.past_key_values)}


class Contenders:
    """{(dtype, name): connection} to the processes of a model's contenders."""

    def __init__(self, model: str, dtypes: list[str]):
        self.connections, self.processes = {}, []
        context = multiprocessing.get_context("spawn")
        with TemporaryDirectory() as folder:
            folders = {BlipRBMForConditionalGeneration: REPO / "checkpoints" / "blip-rbm-small"}
            if model == "blip_base":
                made = blip_base()
                folders = {type(blip): Path(folder) / type(blip).__name__ for blip in made}
                for blip in made:
                    blip.save_pretrained(folders[type(blip)])
            for key in ((dtype, name) for dtype in dtypes for name in CONTENDERS[model]):
                self.connections[key], other = context.Pipe()
                self.processes.append(context.Process(target=serve, args=(other, folders, model, *key), daemon=True))
                self.processes[-1].start()
                self.connections[key].recv()  # ready: one after another

    def ask(self, key, *request):
        time.sleep(0.1)  # the threads of the one before wait busily for a while
        self.connections[key].send(request)
        return self.connections[key].recv()

    def stop(self):
        for connection in self.connections.values():
            connection.send(None)
        for process in self.processes:
            process.join()


def compare(contenders: Contenders, batch: int, beams: int, pairs: int) -> list[dict]:
    """Seconds of vision, first token and whole decoding of each contender, all in turn; the first of a dtype is stock, the second ours
    with the RBM off. `ratio`, `against_first_dtype` and `against_off`: the seconds of stock in the same dtype, of stock in the first
    dtype and of ours with the RBM off, by those of the contender, round by round, medians."""
    keys = [key for key in contenders.connections if beams > 1 or "best of" not in key[1]]
    answers = {key: [] for key in keys}
    for _ in range(pairs + 1):
        for key in keys:
            answers[key].append(contenders.ask(key, batch, beams, False))
    peak = {key: contenders.ask(key, batch, beams, True)["peak_megabytes"] for key in keys}
    seconds = {  # the first turn warms up
        key: {part: [answer["seconds"][part] for answer in answers[key][1:]] for part in answers[key][0]["seconds"]}
        for key in keys
    }
    total = {key: [v + d for v, d in zip(s["vision"], s["decoding"])] for key, s in seconds.items()}
    ratio = lambda of, to: statistics.median(o / t for o, t in zip(of, to))
    rows = []
    for (dtype, name), parts in seconds.items():
        key, (stock, off, *_) = (dtype, name), [other for other in keys if other[0] == dtype]
        last = answers[key][-1]
        rows.append(
            {
                "dtype": dtype,
                "contender": name,
                "images_per_second": batch / statistics.median(total[key]),
                **{part: statistics.median(values) for part, values in parts.items()},
                "ratio": ratio(total[stock], total[key]),
                "decoding_ratio": ratio(seconds[stock]["decoding"], parts["decoding"]),
                "against_first_dtype": ratio(total[keys[0]], total[key]),
                "against_off": ratio(total[off], total[key]),
                "same_tokens": last["tokens"] == answers[stock][-1]["tokens"],
                "cache_megabytes": last["cache"] / 1e6,
                "peak_megabytes": peak[key],
            }
        )
    return rows


def blip_base(rbm_words: int = 1000):
    """Stock BLIP and ours, of BLIP-base's shape, with the same random weights, and an RBM that does something."""
    torch.manual_seed(0)
    config = BlipConfig(vision_config={"image_size": 384}, text_config={"is_decoder": True, "num_attention_heads": 12})
    config.vision_config.initializer_range = 0.02
    stock = BlipForConditionalGeneration(config).eval()
    words = list(range(2000, 2000 + rbm_words))
    ours = BlipRBMForConditionalGeneration.from_blip(stock, rbm_word_ids=words, rbm_cause_tokens=4)
    ours.rbm_layer.rbm.word_weight.data.normal_(0, 0.2)
    ours.rbm_layer.gate.data.fill_(0.1)
    return stock, ours


OFF = {"rbm": False}
# re-rank of sampled candidates needs no beams; it stands beside the others with 3
SAMPLES = {"do_sample": True, "num_beams": 1, "rbm_guidance": 0.1, "rbm_rerank": True}
CONTENDERS = {
    "embedded": {
        "stock cache": (StockCache, OFF),
        "BLIP-RBM, RBM off": (Ours, OFF),
        "BLIP-RBM, guide on": (Ours, {"rbm_rerank": False}),
        "BLIP-RBM, RBM off, 8 bits": (Ours, OFF | {"int8": True}),
        "BLIP-RBM, best of 10 beams": (Ours, {}),
        "BLIP-RBM, best of 10 samples": (Ours, SAMPLES),
    },
    "blip_base": {
        "stock BLIP": (StockBLIP, {}),
        "BLIP-RBM, RBM off": (Ours, OFF),
        "BLIP-RBM, refine and guide": (Ours, {"rbm_guidance": 0.1, "rbm_rerank": False}),
        "BLIP-RBM, RBM off, 8 bits": (Ours, OFF | {"int8": True}),
        "BLIP-RBM, best of 10 samples": (Ours, SAMPLES),
    },
}
IMAGE_SIZE = {"embedded": 260, "blip_base": 384}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "blip_base"], choices=list(CONTENDERS))
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
    running = contenders = None
    for model, batch, beams in tqdm(cells, desc="generate"):
        if running != model:
            if contenders is not None:
                contenders.stop()
            running, contenders = model, Contenders(model, args.dtypes)
        for entry in compare(contenders, batch, beams, args.pairs):
            rows.append({"model": model, "batch": batch, "beams": beams, **entry})
            numbers = " | ".join(f"{entry[name]:.2f}" for name in names[1:])
            print(
                f"| {model} | {entry['dtype']} | {batch} | {beams} | {entry['contender']} | {numbers} | {entry['same_tokens']} | "
                f"{entry['cache_megabytes']:.0f} | {entry['peak_megabytes']:.0f} |",
                flush=True,
            )
        if args.output:  # after every cell: a run of an hour that is stopped has lost nothing
            settings = vars(args) | {
                "threads": torch.get_num_threads(),
                "new_tokens": NEW_TOKENS,
                "processor": processor(),
            }
            write_json(args.output, {"settings": settings, "rows": rows})
    contenders.stop()


if __name__ == "__main__":
    main()
