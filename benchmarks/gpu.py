"""Speed and memory on an accelerator: stock BLIP and BLIP-RBM with the same random weights, side by side in one process.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json        # 8 minutes on a GPU; a tiny shape without one

BLIP-base's and BLIP-large's shape, 20 new tokens, no caption ends early. Contenders take turns; medians over the rounds. "of bound": the
time in which the decoder's weights and the images' keys and values can be read once a step, at the rate at which this device sums a large
tensor, by the time of decoding. "waiting": the share of the time in which the host waits for the device; "reads": numbers that it reads, a
step. Cells that the time does not suffice for are left out and named. Samples need no beams, and stand beside 3 beams as well. The RBM's part
trains by what `boltzmann.RBM(device=...)` does in a step.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BlipConfig, BlipForConditionalGeneration, CompileConfig

from benchmarks.generate import length
from benchmarks.generate_bound import bytes_of_a_step
from boltzmann.fast import FastContrastiveDivergence
from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.inference_blip_rbm import ImageCache, behind_the_door
from modeling_blip_rbm.rbm import RBMParameters
from training.lib.checkpoints import write_json


NEW_TOKENS = 20
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {  # of the vision tower, of the text decoder
    "base": ({"image_size": 384}, {"num_attention_heads": 12}),
    "large": (LARGE | {"image_size": 384}, {"num_attention_heads": 12, "encoder_hidden_size": 1024}),
    "tiny": (
        TINY | {"image_size": 32, "patch_size": 16},
        TINY | {"encoder_hidden_size": 24, "vocab_size": 211, "bos_token_id": 210},
    ),
}
WORDS = {"base": range(2000, 3000), "large": range(2000, 3000), "tiny": range(100, 150)}
SAMPLES = {"do_sample": True, "num_beams": 1, "rbm_rerank": True, "rbm_rerank_candidates": 10}
CONTENDERS = {  # settings of `generate`, beside the cell's number of beams
    "stock BLIP": {},
    "RBM off": {"rbm": False},
    "guide": {"rbm_guidance": 0.1},
    "re-rank of 9 beams": {"rbm_rerank": True, "rbm_rerank_candidates": 9, "rbm_guidance": 0.1},
    "best of 10 samples": SAMPLES | {"rbm_guidance": 0.1},
}
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True, mode="reduce-overhead")}


@dataclass
class Plan:
    """What is measured: on a machine without a GPU hardly anything, so that the script cannot rot."""

    shapes: tuple = ("base", "large")
    dtypes: tuple = ("bfloat16", "float16", "float32")
    batches: tuple = (16, 1, 64)
    beams: tuple = (3, 1)
    rounds: int = 3
    bandwidth_megabytes: int = 2048
    visible: int = 784
    hidden: tuple = (512, 1024, 2048, 4096)
    rbm_batch: int = 1024
    rbm_steps: int = 50

    def cells(self):
        """The most telling first. fp32 is there for its tokens: one cell."""
        for shape, batch, beams, dtype in product(self.shapes, self.batches, self.beams, self.dtypes):
            if dtype != "float32" or (batch, beams) == (self.batches[0], self.beams[0]):
                yield shape, dtype, batch, beams


TINY_PLAN = Plan(("tiny",), ("bfloat16", "float32"), (2,), (3, 1), 1, 8, 31, (17,), 16, 2)


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device) -> tuple:
    wait(device)
    start = time.perf_counter()
    result = function()
    wait(device)
    return result, time.perf_counter() - start


def bandwidth_of(device, megabytes: int) -> float:
    """Bytes a second at which a large tensor is read."""
    memory = torch.ones(megabytes * 2**18, device=device)
    memory.sum()
    return memory.nbytes / min(seconds_of(memory.sum, device)[1] for _ in range(5))


def models_of(shape: str, dtype: str, device):
    """Stock BLIP and ours, with the same random weights and an RBM that does something."""
    torch.manual_seed(0)
    vision, text = SHAPES[shape]
    config = BlipConfig(vision_config=vision, text_config={"is_decoder": True} | text)
    config.vision_config.initializer_range = 0.02
    stock = BlipForConditionalGeneration(config).eval()
    ours = BlipRBMForConditionalGeneration.from_blip(stock, rbm_word_ids=list(WORDS[shape]))
    with torch.no_grad():
        ours.rbm_layer.rbm.word_weight.normal_(0, 0.2)
        ours.rbm_layer.rbm.image_weight.normal_(0, 0.02)
    for model in (stock, ours):  # the RBM stays in fp32, as it is loaded
        model.to(device)
        for name, child in model.named_children():
            if name != "rbm_layer":
                child.to(getattr(torch, dtype))
    return stock, ours


class Contender:
    """One way to caption images: `vision`, then `decode`."""

    def __init__(self, name: str, stock, ours, beams: int, compiled: bool):
        self.is_stock = name == "stock BLIP"
        self.model = stock if self.is_stock else ours
        self.settings = {"num_beams": beams, "do_sample": False} | CONTENDERS[name] | length(NEW_TOKENS)
        if compiled and not self.is_stock:
            self.settings |= COMPILED

    def vision(self, pixels):
        if self.is_stock:
            return self.model.vision_model(pixels)[0]
        return self.model.encode_for_generation(pixels, rbm=self.settings.get("rbm", True))

    def decode(self, image):
        if not self.is_stock:
            return self.model.generate(encoding=image, **self.settings)
        config = self.model.config.text_config  # as `BlipForConditionalGeneration.generate` after its vision model
        return self.model.text_decoder.generate(
            input_ids=torch.full((len(image), 1), config.bos_token_id, device=image.device),
            encoder_hidden_states=image, encoder_attention_mask=torch.ones(image.shape[:2], device=image.device).long(),
            eos_token_id=config.sep_token_id, pad_token_id=config.pad_token_id, **self.settings,
        )  # fmt: skip

    def turn(self, pixels) -> dict:
        """Seconds of vision and of decoding, and the tokens."""
        image, vision = seconds_of(lambda: self.vision(pixels), pixels.device)
        tokens, decoding = seconds_of(lambda: self.decode(image), pixels.device)
        return {"vision": vision, "decoding": decoding, "tokens": tokens}

    def waiting(self, pixels) -> dict:
        """The share of decoding in which the host waits for the device, numbers that it reads a step, and peak megabytes."""
        image, on_gpu = self.vision(pixels), pixels.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.decode(image)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities) as profiler:
            _, seconds = seconds_of(lambda: self.decode(image), pixels.device)
        events = {event.key: event for event in profiler.key_averages()}
        waited = sum(event.self_cpu_time_total for key, event in events.items() if "Synchronize" in key)
        read = events.get("aten::_local_scalar_dense")
        reads = (read.count if read else 0) / NEW_TOKENS
        return {"waiting": waited / 1e6 / seconds, "reads": reads, "peak_megabytes": peak}


@torch.no_grad()
def compare(stock, ours, batch: int, beams: int, bandwidth: float, rounds: int, compiled: bool) -> list[dict]:
    """A row for each contender. `ratio`: stock's seconds by its own; `against_off`: those with the RBM off."""
    weight = next(stock.parameters())
    size = stock.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)).to(weight)
    names = [name for name in CONTENDERS if beams > 1 or "beams" not in name]
    contenders = {name: Contender(name, stock, ours, beams, compiled) for name in names}
    turns = {name: [] for name in names}
    for _ in range(rounds + 1):  # the first warms up
        for name, contender in contenders.items():
            turns[name].append(contender.turn(pixels))
    median = lambda name, part: statistics.median(turn[part] for turn in turns[name][1:])
    total = {name: median(name, "vision") + median(name, "decoding") for name in names}
    ours.optimize_for_inference()
    cache: ImageCache = behind_the_door(ours).new_cache(contenders["RBM off"].vision(pixels).image_embeds)
    bound = NEW_TOKENS * bytes_of_a_step(ours, cache) / bandwidth
    return [
        {
            "batch": batch,
            "beams": beams,
            "contender": name,
            "images_per_second": batch / total[name],
            "vision": median(name, "vision"),
            "decoding": median(name, "decoding"),
            "ratio": total["stock BLIP"] / total[name],
            "against_off": total["RBM off"] / total[name],
            "of_bound": bound / median(name, "decoding"),
            "same_tokens": torch.equal(turns[name][-1]["tokens"], turns["stock BLIP"][-1]["tokens"]),
            **contenders[name].waiting(pixels),
        }
        for name in names
    ]


def rbm_steps(kind: str, v: torch.Tensor, hidden: int):
    """A function that makes one step of PCD-1 on the rows v (n, V): ours, or what one writes first."""
    n, visible = v.shape
    dtype = torch.float32 if kind == "boltzmann" else v.dtype  # whose parameters are fp32 whatever its products are in
    U = 0.01 * torch.randn(visible, hidden, device=v.device, dtype=dtype)
    b, c = U.new_zeros(visible), U.new_zeros(hidden)
    fast = FastContrastiveDivergence(str(v.dtype).removeprefix("torch."), 0, v.device)
    state = {"h": torch.rand(n, hidden, device=v.device).round().to(v.dtype)}

    def boltzmann():
        gradient, state["h"], _ = fast.gradient(RBMParameters(c=c, U=U, b=b), v, state["h"])
        for parameter, change in ((U, gradient.U), (b, gradient.b), (c, gradient.c)):
            parameter.sub_(change, alpha=0.05)

    def plain():
        q = torch.sigmoid(c + v @ U)
        sampled = torch.bernoulli(torch.sigmoid(b + state["h"] @ U.T))
        q_model = torch.sigmoid(c + sampled @ U)
        state["h"] = torch.bernoulli(q_model)
        U.add_(v.T @ q - sampled.T @ q_model, alpha=0.05 / n)
        b.add_((v - sampled).mean(0), alpha=0.05)
        c.add_((q - q_model).mean(0), alpha=0.05)

    return {"boltzmann": boltzmann, "plain loop": plain}[kind]


@torch.no_grad()
def rbm_rows(plan: Plan, dtype: str, device) -> list[dict]:
    """Samples a second of training, and of the 10 V H operations a sample how many a second."""
    rows = []
    for hidden in plan.hidden:
        v = (torch.rand(plan.rbm_batch, plan.visible, device=device) < 0.2).to(getattr(torch, dtype))
        speed = {}
        for kind in ("plain loop", "boltzmann"):
            step = rbm_steps(kind, v, hidden)
            step()
            seconds = min(
                seconds_of(lambda step=step: [step() for _ in range(plan.rbm_steps)], device)[1] for _ in range(3)
            )
            speed[kind] = plan.rbm_steps * len(v) / seconds
            rates = {"samples_per_second": speed[kind], "teraflops": speed[kind] * 10 * plan.visible * hidden / 1e12}
            rows.append(
                {
                    "dtype": dtype,
                    "hidden": hidden,
                    "contender": kind,
                    **rates,
                    "ratio": speed[kind] / speed["plain loop"],
                }
            )
    return rows


def printed(row: dict, names: tuple):
    text = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()}
    print("| " + " | ".join(text[name] for name in names) + " |", flush=True)


def header(names: tuple):
    print("\n| " + " | ".join(names).replace("_", " ") + " |\n" + "|---" * len(names) + "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=440, help="no cell is begun later")
    parser.add_argument("--compiled", action="store_true", help="static cache and CUDA graphs for ours")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    device, start = torch.device(args.device), time.perf_counter()
    plan = Plan() if device.type == "cuda" else TINY_PLAN
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    bandwidth = bandwidth_of(device, plan.bandwidth_megabytes)
    print(f"{name}: {bandwidth / 1e9:.0f} GB/s, {NEW_TOKENS} new tokens")
    rows, left_out, rbm = [], [], []
    columns = ("dtype", "hidden", "contender", "samples_per_second", "teraflops", "ratio")
    header(columns)
    for dtype in ("float32", "bfloat16"):
        for row in rbm_rows(plan, dtype, device):
            rbm.append(row)
            printed(row, columns)
    columns = ("shape", "dtype", "batch", "beams", "contender", "images_per_second", "ratio", "against_off", "of_bound", "waiting", "reads",
               "peak_megabytes", "same_tokens")  # fmt: skip
    header(columns)
    models, made_of = None, None
    for shape, dtype, batch, beams in plan.cells():
        if time.perf_counter() - start > args.seconds:
            left_out.append([shape, dtype, batch, beams])
            continue
        if made_of != (shape, dtype):
            models, made_of = models_of(shape, dtype, device), (shape, dtype)
        for row in compare(*models, batch, beams, bandwidth, plan.rounds, args.compiled):
            rows.append({"shape": shape, "dtype": dtype} | row)
            printed(rows[-1], columns)
    if left_out:
        print(f"left out after {args.seconds:.0f} s: {left_out}")
    if args.output:
        settings = vars(args) | {"device": name, "torch": torch.__version__, "gigabytes_per_second": bandwidth / 1e9}
        write_json(args.output, {"settings": settings, "rows": rows, "rbm": rbm, "left_out": left_out})


if __name__ == "__main__":
    main()
