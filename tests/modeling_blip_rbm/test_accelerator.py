"""What can be known without an accelerator of how the model runs on one: nothing waits for it, nothing is copied for every beam, memory does
not grow with the steps, and energies are fp32 whatever the rest is."""

import copy
import gc
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, GenerationMixin

from modeling_blip_rbm import BlipRBMForConditionalGeneration, vision_blip_rbm
from modeling_blip_rbm.inference_blip_rbm import FastInference, attention_in_turn, may_be_fast
from modeling_blip_rbm.processors_blip_rbm import ChosenLogProb, InverseTransformSampling
from modeling_blip_rbm.rbm import RBMParameters, word_gains
from modeling_blip_rbm.static_blip_rbm import static_cache
from tests.conftest import VOCABULARY, tiny_config


STRATEGIES = {
    "guide": {"rbm_guidance": 0.7},
    "guide, second order, beams": {"rbm_guidance": 0.7, "rbm_guidance_order": "second", "num_beams": 3},
    "guide, beams, penalty": {"rbm_guidance": 0.7, "num_beams": 3, "repetition_penalty": 1.3},
    "re-rank": {"rbm_guidance": 0.7, "rbm_rerank": True, "num_beams": 3},
    "re-rank of samples": {"rbm_guidance": 0.7, "rbm_rerank": True, "do_sample": True},
    "several captions": {"rbm_diversity": 3.0, "num_return_sequences": 3},
    "static cache": {"rbm_guidance": 0.7, "num_beams": 3, "cache_implementation": "static"},
}


# ---------------------------------------------------------------- nothing waits


class Waits(TorchDispatchMode):
    """Notes the file and function that read numbers on the host, for which a GPU would have to be waited for."""

    OPERATIONS = {
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "is_nonzero",
        "item",
        "masked_select",
        "equal",
    }

    def __init__(self):
        super().__init__()
        self.places, self.active = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket is torch.ops.aten.index else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or func.overloadpacket.__name__ in self.OPERATIONS:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self):
        if self.active:
            files = [
                f for f in traceback.extract_stack() if "/tests/" not in f.filename and "/torch/" not in f.filename
            ]
            self.places.append(f"{Path(files[-1].filename).name}:{files[-1].name}")


@pytest.fixture
def waits(monkeypatch):
    """`Waits` within transformers' loops over the steps."""
    mode = Waits()
    for name in ("_sample", "_beam_search"):
        own = getattr(GenerationMixin, name)

        def watched(self, *args, own=own, **kwargs):
            mode.active = True
            with mode:
                outputs = own(self, *args, **kwargs)
            mode.active = False
            return outputs

        monkeypatch.setattr(GenerationMixin, name, watched)
    for name in ("tolist", "cpu", "numpy"):  # which on a CPU do not go through the dispatcher
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, own=own, **kw: mode.note() or own(self, *args, **kw)
        )
    return mode


def waits_of(model, encoding, waits, steps, settings) -> tuple[list[str], int]:
    """What of ours waits, and how often transformers does."""
    waits.places.clear()
    model.generate(encoding=encoding, max_new_tokens=steps, min_new_tokens=steps, **settings)
    ours = [place for place in waits.places if "blip_rbm" in place or place.startswith("rbm.py")]
    return ours, len(waits.places) - len(ours)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_loop_reads_nothing_but_whether_to_go_on(model, pixel_values, waits, name):
    encoding = model.encode_image(pixel_values)
    ours, few = waits_of(model, encoding, waits, 5, STRATEGIES[name])
    assert not ours
    ours, many = waits_of(model, encoding, waits, 13, STRATEGIES[name])
    assert not ours and many - few == 13 - 5  # transformers looks once a step whether all captions have ended


def test_the_count_sees_what_waits(model, pixel_values, waits):
    """The ways in which host code reads a tensor, in a logits processor of a user's."""
    reads = [
        lambda s: s.max().item(),
        lambda s: bool(s.sum() > 0),
        lambda s: s.nonzero(),
        lambda s: s[s > 0],
        lambda s: s.tolist(),
    ]
    reads += [lambda s: s.unique(), lambda s: s.argmax().cpu()]
    for read in reads:
        before = waits_of(model, model.encode_image(pixel_values), waits, 5, {})[1]
        processor = lambda ids, scores, read=read: (read(scores), scores)[1]
        assert (
            waits_of(model, model.encode_image(pixel_values), waits, 5, {"logits_processor": [processor]})[1] > before
        )


def five_steps(model, encoding, order: str, static: bool, prepared=lambda: None):
    """What a step of `generate` does, without transformers' loop around it; `prepared` is called before the first."""
    fast, device = FastInference(model), encoding.image_embeds.device
    settings = model.decoding_settings(rbm_guidance=0.7, rbm_guidance_order=order)
    guides = model._guides(fast, encoding.hidden_input, settings, 0.0, 2)
    log_prob, sampling = ChosenLogProb(3), InverseTransformSampling()
    cache = static_cache(fast, encoding.image_embeds, 7) if static else fast.new_cache(encoding.image_embeds)
    ids = torch.ones(6, 1, dtype=torch.long, device=device)
    prepared()
    for _ in range(5):
        inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
        scores = model(**inputs).logits[:, -1].float()
        for processor in (log_prob, *guides, sampling):
            scores = processor(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        log_prob.chosen(ids)
        cache.reorder_cache(torch.zeros(6, dtype=torch.long, device=device))
    assert log_prob.of(ids[:, 1:], torch.zeros_like(ids[:, 1:])).shape == (6, 5)


@torch.no_grad()
@pytest.mark.parametrize("order", ["exact", "second"])
@pytest.mark.parametrize("static", [False, True])
def test_a_step_on_a_device_that_cannot_be_read(order, static):
    """Fake tensors on a device that is no CPU: they raise where a number is read, and where a tensor of the host meets one of theirs."""
    model = BlipRBMForConditionalGeneration(tiny_config()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoding = model.to("meta").encode_image(torch.empty(2, 3, 24, 24, device="meta"))
        with pytest.raises(DataDependentOutputException):
            encoding.hidden_input.sum().item()
        five_steps(model, encoding, order, static)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("static", [False, True])
def test_a_step_on_a_gpu(model, pixel_values, static):
    encoding = model.cuda().encode_image(pixel_values[:2].cuda())
    try:
        five_steps(model, encoding, "exact", static, lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gate_is_read_when_it_has_changed(monkeypatch, pixel_values):
    model = BlipRBMForConditionalGeneration(tiny_config(rbm_cause_tokens=2)).eval()
    tokens = lambda: model.encode_image(pixel_values).image_embeds.shape[1]
    monkeypatch.setattr(vision_blip_rbm, "is_waited_for", lambda tensor: True)
    reads, layer = [], model.rbm_layer
    own = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: reads.append(t.shape) or own(t))
    read = lambda: reads.count((1,))
    closed = [tokens() for _ in range(3)]
    assert closed == [10, 10, 10] and read() == 1
    with torch.no_grad():
        layer.gate.fill_(0.5)
    assert [tokens() for _ in range(3)] == [12, 12, 12] and read() == 2
    other = copy.deepcopy(model)
    layer.gate = torch.nn.Parameter(torch.zeros(1))
    assert tokens() == 10 and other.encode_image(pixel_values).image_embeds.shape[1] == 12


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}])
def test_the_memory_of_rerank_does_not_grow_with_the_steps(model, pixel_values, settings):
    """Tensors of a number for each row and token of the vocabulary that are alive: those of one step, where all steps' logits were."""

    def most_alive(steps):
        counts = []

        def count(ids, scores, **kwargs):
            large = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape[-1:] == (len(VOCABULARY),))
            counts.append(sum(t.numel() for t in large if t.dim() in (2, 3) and not isinstance(t, torch.nn.Parameter)))
            return torch.zeros(len(ids), dtype=torch.bool)

        model.generate(
            pixel_values, rbm_rerank=True, rbm_guidance=0.7, stopping_criteria=[count], max_new_tokens=steps, min_new_tokens=steps, **settings
        )  # fmt: skip
        assert len(counts) == steps
        return max(counts)

    assert most_alive(17) == most_alive(4) > 0


def test_the_guide_holds_few_rows_logarithms():
    """Exact gains of many rows: in parts of 2^18 numbers on a CPU."""
    seen = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    params = RBMParameters(c=torch.randn(67), U=torch.randn(101, 67))
    a = torch.randn(131, 67)
    with Largest():
        gains = word_gains(params, a)
    assert 2**17 < max(seen) <= 2**18
    torch.testing.assert_close(gains, torch.stack([word_gains(params, row) for row in a]), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- the image's keys, once


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_the_image_by_the_fused_kernel(masked):
    """As on a CPU: what takes the place of PyTorch's kernel there gives the same."""
    query, key, value = torch.randn(2, 4, 15, 7), torch.randn(2, 4, 13, 7), torch.randn(2, 4, 13, 7)
    mask = torch.zeros(2, 1, 1, 13).masked_fill(torch.rand(2, 1, 1, 13) > 0.6, -1e30) if masked else None
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attention_in_turn(query, key, value, mask), fused, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- a static cache, compiled


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"rbm_guidance": 0.7, "rbm_rerank": True},
        {"rbm_diversity": 3.0, "num_return_sequences": 2},
    ],
)
@pytest.mark.parametrize("prompted", [False, True])
def test_a_static_cache_gives_the_same_tokens(model, pixel_values, settings, prompted):
    prompts = torch.tensor([[44, 9, 11], [44, 13, 0], [44, 23, 29], [44, 0, 0], [44, 5, 7]]) if prompted else None
    tokens = []
    for kind in ("static", None):
        torch.manual_seed(0)
        tokens.append(model.generate(pixel_values, prompts, max_new_tokens=9, cache_implementation=kind, **settings))
    assert torch.equal(*tokens)


def test_a_static_cache_of_the_generation_config(model, pixel_values):
    expected = model.generate(pixel_values, num_beams=3, max_new_tokens=9)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(pixel_values, num_beams=3, max_new_tokens=9), expected)
    assert model.generation_config.cache_implementation == "static"
    model.caption_evidence(model.encode_image(pixel_values), expected)
    assert len(model.generate(pixel_values)) == 5  # transformers' own length


def test_a_compiled_step_is_one_graph(model, pixel_values):
    """Without a graph break, and compiled once: for all steps and for later calls."""
    torch._dynamo.reset()
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    settings = {"num_beams": 3, "rbm_guidance": 0.7, "max_new_tokens": 9}
    expected = model.generate(pixel_values, **settings)
    for _ in range(2):
        compiled = model.generate(pixel_values, **settings, cache_implementation="static", compile_config=config)
        assert torch.equal(compiled, expected)
    assert len(graphs) == 1


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_energies_are_fp32_in_half_precision(model, pixel_values, tmp_path, dtype):
    """Of a checkpoint in half precision that was saved in fp32: the RBM's own numbers, to the last bit."""
    model.save_pretrained(tmp_path)
    half = BlipRBMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.text_decoder.parameters()} == {dtype}
    for ours, theirs in zip(half.rbm_layer.state_dict().values(), model.rbm_layer.state_dict().values()):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    tokens = model.vision_hidden_states(pixel_values)
    expected = model.rbm_layer.hidden_input(tokens.to(dtype).float())
    torch.testing.assert_close(half.rbm_layer.hidden_input(tokens.to(dtype)), expected, atol=1e-2, rtol=1e-2)


def test_energies_are_fp32_under_autocast(model, pixel_values):
    settings = {"rbm_guidance": 0.7, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    tokens = model.vision_hidden_states(pixel_values)
    encoding = model.encode_image(vision_hidden_states=tokens)
    captions = model.generate(encoding=encoding, max_new_tokens=7, num_beams=3)
    guide = model._guides(None, encoding.hidden_input, model.decoding_settings(rbm_guidance=0.7), 0.0, 5)[0]
    scores = torch.zeros(len(captions), len(VOCABULARY))
    energies = lambda: (
        model.rbm_layer.hidden_input(tokens),
        model._free_energy(tokens),
        model.image_relative_free_energy(vision_hidden_states=tokens),
        guide(captions, scores),
        model.candidate_parts(encoding, captions, scored=(scores[:, 0], scores[:, 0]))["pmi"],
    )
    expected = energies()
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_be_fast(model)
        assert (model.text_decoder.cls(torch.randn(1, 1, 28))).dtype == torch.bfloat16
        for ours, theirs in zip(energies(), expected):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        model.generate(pixel_values, max_new_tokens=5, **settings)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_of_blips_tower(saved_model, model, pixel_values, implementation, monkeypatch):
    calls, own = [], vision_blip_rbm.F.scaled_dot_product_attention
    monkeypatch.setattr(
        vision_blip_rbm.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or own(*a, **k)
    )
    loaded = BlipRBMForConditionalGeneration.from_pretrained(saved_model, attn_implementation=implementation)
    ours = loaded.vision_hidden_states(pixel_values)
    assert len(calls) == (2 if implementation == "sdpa" else 0)
    torch.testing.assert_close(ours, model.vision_hidden_states(pixel_values), atol=1e-5, rtol=1e-4)


def test_flash_attention_2_is_refused_in_a_line(saved_model):
    with pytest.raises((ImportError, ValueError)):
        BlipRBMForConditionalGeneration.from_pretrained(saved_model, attn_implementation="flash_attention_2")


# ---------------------------------------------------------------- several devices


def test_a_balanced_device_map_splits_no_layer(model, pixel_values, monkeypatch):
    """For two devices of which the first is too small, the layers that must stay whole do; and Accelerate's hooks, by which tensors follow the
    weights, carry every one of them, with the tokens of one device."""
    settings = {"rbm_guidance": 0.7, "rbm_rerank": True, "rbm_rerank_pmi": 0.3, "max_new_tokens": 7}
    expected = model.generate(pixel_values, **settings)
    whole = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    size = sum(p.nbytes for p in model.parameters())
    plan = infer_auto_device_map(
        model, {0: int(0.7 * size), 1: 2 * size}, no_split_module_classes=model._no_split_modules
    )
    assert set(plan.values()) == {0, 1}
    for name in whole:
        assert not any(key.startswith(name + ".") for key in plan), name
    called, own = set(), AlignDevicesHook.pre_forward
    monkeypatch.setattr(
        AlignDevicesHook, "pre_forward", lambda hook, m, *a, **k: called.add(id(m)) or own(hook, m, *a, **k)
    )
    model = dispatch_model(model, dict.fromkeys(plan, "cpu"), main_device="cpu", force_hooks=True)
    assert torch.equal(model.generate(pixel_values, **settings), expected)
    stages = whole & set(plan)
    assert stages and {id(model.get_submodule(name)) for name in stages} <= called
