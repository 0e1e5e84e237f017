"""What transformers, its trainers and the tools around it expect of a model, and what `generate` refuses."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DynamicCache,
    EfficientNetConfig,
    EncoderDecoderCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TextStreamer,
    Trainer,
    TrainingArguments,
    ViTConfig,
)

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMForImageTextRetrieval
from tests.conftest import VOCABULARY, randomise, tiny_config
from tests.modeling_blip_rbm.test_modeling import captions_of


DEC, SEP = VOCABULARY.index("[DEC]"), VOCABULARY.index("[SEP]")


def rows(pixel_values, ids):
    return [{"pixel_values": p, "input_ids": i, "labels": i.clone()} for p, i in zip(pixel_values, ids)]


@pytest.fixture
def ids():
    ids = torch.randint(5, 40, (5, 7))
    ids[:, 0], ids[:, -1] = DEC, SEP
    return ids


# ---------------------------------------------------------------- training


@pytest.fixture
def convolutional():
    config = EfficientNetConfig(
        image_size=65, width_coefficient=0.3, depth_coefficient=0.2, hidden_dim=384, depthwise_padding=[]
    )
    return randomise(BlipRBMForConditionalGeneration(tiny_config(vision_config=config)), std=0.05)


@pytest.mark.parametrize("trainer", ["loop", "Trainer", "inside another module"])
def test_training_leaves_the_towers_batch_normalisation_alone(convolutional, ids, tmp_path, trainer):
    """transformers' EfficientNet hands Keras' momentum 0.99 to PyTorch: one step would replace its statistics."""
    model, pixel_values = convolutional, torch.randn(5, 3, 65, 65)
    before = {name: b.clone() for name, b in model.vision_model.named_buffers()}
    if trainer == "Trainer":
        args = TrainingArguments(
            tmp_path, max_steps=2, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        Trainer(model, args, train_dataset=rows(pixel_values, ids)).train()
    else:
        (model if trainer == "loop" else torch.nn.Sequential(model)).train()
        model(pixel_values, ids, labels=ids).loss.backward()
    assert model.training
    for name, b in model.vision_model.named_buffers():
        assert torch.equal(b, before[name]), name
    momenta = [m.momentum for m in model.vision_model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert momenta and min(momenta) == pytest.approx(0.01) and max(momenta) <= 0.1
    model.vision_model.train()  # on purpose
    model(pixel_values, ids, labels=ids)
    assert any(not torch.equal(b, before[name]) for name, b in model.vision_model.named_buffers())


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_every_parameter_that_is_trained_gets_a_gradient(model, pixel_values, ids, gate):
    """DistributedDataParallel waits for those that get none."""
    with torch.no_grad():
        model.rbm_layer.gate.fill_(gate)
    model.train()(pixel_values, ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in model.rbm_layer.rbm.parameters())


def test_a_loaded_rbm_is_not_trained_by_captions_either(saved_model):
    model = BlipRBMForConditionalGeneration.from_pretrained(saved_model)
    assert not any(p.requires_grad for p in model.rbm_layer.rbm.parameters())
    assert model.rbm_layer.gate.requires_grad


def test_seq2seq_trainer_does_not_hand_the_reference_to_generate_as_its_prompt(
    model, pixel_values, ids, tmp_path, processor
):
    args = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, use_cpu=True, report_to=[], disable_tqdm=True, generation_max_length=9
    )
    for processing_class in (processor, processor.tokenizer):
        trainer = Seq2SeqTrainer(model, args, processing_class=processing_class)
        predicted = torch.tensor(trainer.predict(rows(pixel_values, ids)).predictions)
        assert not predicted[:, 9:].any()  # pads, as long as the references
        assert captions_of(predicted[:, :9]) == captions_of(model.generate(pixel_values, max_length=9))


def test_what_labels_mask_is_the_prompt(model, pixel_values, ids):
    labels = ids.clone()
    labels[:, :3] = -100
    prompted = model.generate(pixel_values, ids[:, :3], max_new_tokens=5)
    assert torch.equal(model.generate(pixel_values, ids, labels=labels, max_new_tokens=5), prompted)


def test_gradients_of_a_copy_while_another_thread_generates(model, pixel_values, ids):
    """The fast path stands beside the model: a step of training between two captions is like one without them."""
    other = copy.deepcopy(model)
    model.generate(pixel_values)
    for one in (model, other):
        one(pixel_values, ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name


TOWERS = {
    "dinov2": Dinov2Config(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7),
    "clip": CLIPVisionConfig(
        hidden_size=22, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    ),
    "vit": ViTConfig(
        hidden_size=22, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    ),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_every_trained_parameter_of_other_towers_gets_a_gradient(tower, ids):
    model = BlipRBMForConditionalGeneration(tiny_config(vision_config=TOWERS[tower])).train()
    model(torch.randn(5, 3, 28, 28), ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_of_a_tower_that_takes_blips_place(implementation):
    config = tiny_config(vision_config=TOWERS["dinov2"], attn_implementation=implementation)
    assert config.vision_config._attn_implementation == implementation


# ---------------------------------------------------------------- outputs and caches


def test_records_that_the_config_asks_for(model, saved_model, pixel_values, ids):
    assert model(pixel_values, ids).hidden_states is None
    asked = BlipRBMForConditionalGeneration.from_pretrained(
        saved_model, output_hidden_states=True, attn_implementation="eager"
    ).eval()
    assert len(asked(pixel_values, ids).hidden_states) == 4


def test_a_cache_that_holds_the_image_goes_on_without_it(model, pixel_values, ids):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole = model(pixel_values, ids).logits
    first = model(pixel_values, ids[:, :3], past_key_values=cache, use_cache=True)
    rest = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="give an image: pixel_values"):
        model(input_ids=ids)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_a_cache_implementation_may_be_named(model, pixel_values, settings):
    named = model.generate(pixel_values, cache_implementation="dynamic", **settings)
    assert torch.equal(named, model.generate(pixel_values, **settings))


def test_samples_do_not_depend_on_what_is_returned(model, pixel_values):
    settings = {"do_sample": True, "max_new_tokens": 7, "top_k": 11}
    samples = []
    for asked in ({}, {"output_scores": True, "return_dict_in_generate": True}):
        torch.manual_seed(3)
        samples.append(model.generate(pixel_values, **settings, **asked))
    assert torch.equal(samples[0], samples[1].sequences)
    assert all(torch.isfinite(scores).sum() == 11 * 5 for scores in samples[1].scores)  # what top_k leaves


def test_a_streamer(model, pixel_values, processor, capsys):
    streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
    model.generate(pixel_values[:1], streamer=streamer, max_new_tokens=5)
    assert capsys.readouterr().out.strip()
    with pytest.raises(ValueError, match="re-rank chooses among finished captions: pass rbm_rerank=False"):
        model.generate(pixel_values[:1], streamer=streamer, rbm_rerank=True)


def test_weights_that_accelerate_keeps_elsewhere(model, pixel_values, tmp_path):
    """Its hooks bring them for a module's forward; guide and re-rank read them outside of it."""
    from accelerate import disk_offload

    settings = {"rbm_guidance": 0.7, "rbm_rerank": True, "rbm_rerank_pmi": 0.3, "num_beams": 3}
    expected = model.generate(pixel_values, **settings)
    offloaded = disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in offloaded.rbm_layer.parameters())
    assert torch.equal(offloaded.generate(pixel_values, **settings), expected)
    assert torch.equal(offloaded.image_free_energy(pixel_values), model.image_free_energy(pixel_values))
    relative = model.image_relative_free_energy(pixel_values)
    assert torch.equal(offloaded.image_relative_free_energy(pixel_values), relative)


def test_resized_embeddings_keep_the_rbm(model, pixel_values):
    """New words are added behind the others; the RBM's words and captions stay."""
    expected = model.generate(pixel_values, rbm_guidance=0.7, suppress_tokens=[len(VOCABULARY)])
    model.resize_token_embeddings(len(VOCABULARY) + 1)
    again = model.generate(pixel_values, rbm_guidance=0.7, suppress_tokens=[len(VOCABULARY)])
    assert torch.equal(again, expected)


# ---------------------------------------------------------------- what is refused, and what is spread


def test_one_prompt_for_all_images_and_several_for_one(model, pixel_values):
    prompt = torch.tensor([[DEC, 9, 11]])
    every = model.generate(pixel_values, prompt.repeat(5, 1), rbm_rerank=True, rbm_guidance=0.4)
    assert torch.equal(model.generate(pixel_values, prompt, rbm_rerank=True, rbm_guidance=0.4), every)
    assert torch.equal(model.generate(pixel_values, prompt[0], rbm_rerank=True, rbm_guidance=0.4), every)
    prompts = torch.tensor([[DEC, 9, 11], [DEC, 13, 7], [DEC, 23, 29]])
    together = model.generate(pixel_values[:1], prompts, rbm_rerank=True, rbm_guidance=0.4)
    assert len(together) == 3
    for prompt, caption in zip(prompts, together):
        alone = model.generate(pixel_values[:1], prompt[None], rbm_rerank=True, rbm_guidance=0.4)
        assert captions_of(alone) == captions_of(caption[None])
    with pytest.raises(ValueError, match="there are 3 prompts for 5 images"):
        model.generate(pixel_values, prompts)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rbm_guidance": float("nan")}, "rbm_guidance is nan"),
        ({"rbm_guidance": float("inf")}, "rbm_guidance is inf"),
        ({"rbm_guidance": 1e9}, "rbm_guidance is 1000000000.0"),
        ({"rbm_rerank": "no"}, "rbm_rerank is 'no'; allowed: True, False"),
        ({"rbm_diversity": float("nan"), "num_return_sequences": 2}, "rbm_diversity is nan"),
        ({"rbm_rerank_cider": 3.0}, "rbm_rerank_cider is 3.0, but this RBM has no phrases"),
        ({"input_ids": torch.full((600,), 5)}, "the prompt has 600 tokens, but the decoder's context has 31"),
        ({"encoding": "its own"}, "encoding is the image already"),
        ({"cache_implementation": "offloaded_static"}, "cache_implementation is 'offloaded_static'"),
        ({"cache_implementation": "static", "output_attentions": True}, "cache_implementation is 'static'"),
        ({"num_beams": 0}, "num_beams is 0; allowed: an int from 1"),
        ({"input_ids": torch.full((5, 2), 10**6)}, "allowed: token ids from 0 to"),
        ({"assistant_model": "itself"}, "an assistant is not shown the image"),
    ],
)
def test_what_generate_refuses(model, pixel_values, settings, message):
    if "encoding" in settings:
        settings = {"encoding": model.encode_image(pixel_values)}
    with pytest.raises(ValueError, match=message):
        model.generate(pixel_values, **settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(model, pixel_values, bad):
    pixel_values[2, 1, 3, 5] = bad
    for call in (model.generate, model.encode_image, model.image_free_energy):
        with pytest.raises(ValueError, match="pixel_values has NaN or infinite values"):
            call(pixel_values)


def test_more_new_tokens_than_the_context_cost_nothing(model, pixel_values, monkeypatch):
    longest, own = [], torch.full
    monkeypatch.setattr(
        torch, "full", lambda size, *args, **kwargs: longest.append(max(size)) or own(size, *args, **kwargs)
    )
    out = model.generate(pixel_values, max_new_tokens=10**6, num_beams=3)
    assert out.shape[1] <= 31 and max(longest, default=0) < 10**5


@pytest.mark.parametrize(
    "lost, message",
    [
        ("text_decoder.bert.encoder.layer.1.output.dense.weight", "lacks the weights text_decoder.bert"),
        ("vision_model.post_layernorm.weight", "lacks the weights vision_model.post_layernorm.weight"),
        ("rbm_layer.rbm.word_weight", "has only a part of an RBM: it lacks rbm_layer.rbm.word_weight"),
    ],
)
def test_a_checkpoint_with_a_missing_weight_is_refused(saved_model, lost, message):
    file = saved_model / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        BlipRBMForConditionalGeneration.from_pretrained(saved_model)


def test_the_retrieval_head_reads_the_captioners_folder(saved_model, model, pixel_values, processor):
    matcher = BlipRBMForImageTextRetrieval.from_pretrained(saved_model).eval()
    texts = processor.tokenizer(["a dog", "a red ball on the grass"], padding=True, return_tensors="pt")
    output = matcher(pixel_values=pixel_values, **texts)  # token_type_ids, if the tokenizer gives them
    assert output.logits_per_image.shape == (5, 2)
    torch.testing.assert_close(output.image_free_energy, model.image_free_energy(pixel_values))
    relative = model.image_relative_free_energy(pixel_values)
    torch.testing.assert_close(output.image_relative_free_energy, relative)
