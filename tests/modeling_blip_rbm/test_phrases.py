"""The phrase block: expected CIDEr-D against the metric itself and against plain dictionaries, its fit against least squares."""

import numpy as np
import pytest
import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, DecodingSettings, phrases_blip_rbm
from modeling_blip_rbm.phrases_blip_rbm import PhraseBlock, length_factors, ngram_numbers
from training.fit_phrases import choose_phrases, fit, mean_vectors
from training.lib.metrics import CiderD


PAD, SEP, DEC, VOCAB, H = 0, 3, 44, 47, 7
# 5 images with 3, 1, 2, 2 and 3 captions, as words that are token ids
CAPTIONS = [
    ["5 9 7 11 5 9", "5 9 13", "17 5 9 7"],
    ["5 9 7 11"],
    ["13 17 5 9", "19 23 13"],
    ["29 31 7 11 5", "29 31"],
    ["13 17 5 23 19", "5 9 7 31 29 11", "7"],
]


def ids_of(texts: list[str], length: int = 8) -> torch.Tensor:
    rows = [[int(word) for word in text.split()] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


@pytest.fixture
def block():
    words = ids_of([text for of_image in CAPTIONS for text in of_image])
    image = np.repeat(np.arange(5), [len(of_image) for of_image in CAPTIONS])
    block = choose_phrases(words, image, PAD, 1, H, VOCAB)
    return block, words, image


def test_ngrams_have_numbers_of_their_own():
    sequences = torch.tensor([[5, 9, 5, PAD, 5, 9], [0, 0, 0, 0, 0, 0]])
    numbers, kept = ngram_numbers(sequences, 2, (PAD,), 48)
    assert numbers[0].tolist()[:2] == [6 * 48 + 10, 10 * 48 + 6] and numbers[0, 0] == numbers[0, 4]
    assert kept.tolist() == [[True, True, False, False, True], [False] * 5]
    single, _ = ngram_numbers(torch.tensor([[0, 5], [0, 0]]), 1, (), 48)
    assert len({*single.flatten().tolist(), *numbers[0].tolist()}) == 2 + 4  # of two orders: never the same


def test_expected_cider_of_known_references_is_cider(block):
    """Where the causes say just the vectors of an image's captions: CIDEr-D, of captions that say nothing twice and are as long as these."""
    block, words, image = block
    targets = mean_vectors(block, words, image, PAD).toarray()
    block.length_factor.fill_(1.0)
    metric = CiderD(CAPTIONS)
    candidates = ["5 9 7", "29 31 13", "41 5 9", "17 41 43", "13 17 5 23 19"]
    sequences = torch.tensor([[DEC, *row, SEP, SEP] for row in ids_of(candidates, 5).tolist()])
    for i in range(5):
        block.bias.copy_(torch.from_numpy(targets[i]))
        expected = []
        for text in candidates:  # the metric's own score, its penalty for another length and its clipping undone
            vectors, norms, _ = metric._vectors(dict.fromkeys(_ngrams(text), 1))
            total = 0.0
            for ref, ref_norms, _ in metric.references[i]:
                for v, norm, r, ref_norm in zip(vectors, norms, ref, ref_norms):
                    if norm and ref_norm:
                        once = {
                            g: value / max(1, round(value / idf_of(metric, g)))
                            for g, value in r.items()
                            if idf_of(metric, g)
                        }
                        total += sum(v[g] * once[g] for g in v if g in once) / (norm * ref_norm)
            expected.append(10 * total / 4 / len(metric.references[i]))
        got = block.expected_cider(torch.zeros(1, H), sequences[None], (PAD, SEP, DEC))[0]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float), atol=1e-5, rtol=1e-4)
    assert got.max() > 1


def _ngrams(text: str) -> set[tuple]:
    words = text.split()
    return {tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)}


def idf_of(metric, g) -> float:
    return metric.log_images - np.log(max(1, metric.document_frequency[g]))


def test_rare_phrases_are_left_out(block):
    full, words, image = block
    few = choose_phrases(words, image, PAD, 3, H, VOCAB)
    frequency = {}
    for of_image in CAPTIONS:
        for g in set().union(*map(_ngrams, of_image)):
            frequency[g] = frequency.get(g, 0) + 1
    often = [count for count in frequency.values() if count >= 3]
    assert len(full.numbers) == len(frequency) and len(few.numbers) == len(often) > 3
    torch.testing.assert_close(few.idf.sort().values, torch.tensor(np.sort(np.log(5 / np.array(often)))).float())
    # n-grams that are no phrases make a caption's vector longer, as one that a single image says
    columns, values = few.vectors(ids_of(["5 9 41"], 3), (PAD,))
    known = few.idf[columns[0, :3]] * (values[0, :3] > 0)
    torch.testing.assert_close(values[0, :2], known[:2] / torch.sqrt((known[:2] ** 2).sum() + np.log(5) ** 2))
    with pytest.raises(ValueError, match="captions of 6 images: lower --min_images"):
        choose_phrases(words, image, PAD, 6, H, VOCAB)


def test_rarity_is_the_idf_above_that_of_words_that_are_common(block, monkeypatch):
    full, words, image = block
    monkeypatch.setattr(phrases_blip_rbm, "RARE_FROM", 0.6)
    said_of = {"5": 4, "7": 4, "31": 2, "41": 1, "19": 1, "43": 0}  # images; 43 counts as the rarest word
    rare = {word: max(0.0, np.log(5 / max(images, 1)) - 0.6) for word, images in said_of.items()}
    assert rare["5"] == 0 < rare["31"] < rare["41"]
    texts = ["5 7 31", "31 5 31", "41 31 43", "5 7"]
    sequences = torch.tensor([[DEC, *row, SEP, PAD] for row in ids_of(texts, 4).tolist()]).view(2, 2, -1)
    got = full.rarity(sequences, (PAD, SEP, DEC))
    expected = [sum(rare[word] for word in set(text.split())) for text in texts]
    torch.testing.assert_close(got, torch.tensor(expected).float().view(2, 2))
    few = choose_phrases(words, image, PAD, 2, H, VOCAB)
    assert few.token_rarity(torch.tensor([41, 31])).tolist() == pytest.approx([np.log(5 / 2) - 0.6] * 2)


def test_guide_favours_rare_words(model, pixel_values, monkeypatch):
    vocab, word_ids = model.config.text_config.vocab_size, model.config.rbm_word_ids
    block = PhraseBlock(len(word_ids), model.config.rbm_hidden_size, vocab)
    block.numbers.copy_(torch.tensor(word_ids) + 1)
    block.idf.copy_(torch.linspace(0, 3, len(word_ids)))
    monkeypatch.setattr(phrases_blip_rbm, "RARE_FROM", 1.0)
    with pytest.raises(ValueError, match="rbm_guidance_rarity is 0.5, but this RBM has no phrases"):
        model.generate(pixel_values, rbm_guidance_rarity=0.5)
    model.set_phrases(block)
    hidden_input = model.encode_image(pixel_values).hidden_input
    ids, scores = torch.full((len(pixel_values), 1), DEC), torch.zeros(len(pixel_values), vocab)
    plain, favoured = (
        model._guides(None, hidden_input, DecodingSettings(rbm_guidance=0.3, rbm_guidance_rarity=rarity), 0.0, 5)[0](
            ids, scores
        )
        for rarity in (0.0, 0.5)
    )
    more = 1 + 0.5 * (torch.linspace(0, 3, len(word_ids)) - 1).clamp(min=0)
    torch.testing.assert_close(favoured[:, word_ids], more * plain[:, word_ids])
    assert more[0] == 1 < more[-1] and plain[:, word_ids].abs().min() > 0


def test_lengths_unlike_the_references_cost():
    factors = length_factors(torch.tensor([4, 4, 7]))
    for length in (0, 4, 9):
        expected = np.mean([np.exp(-((length - other) ** 2) / 72) for other in (4, 4, 7)])
        assert factors[length].item() == pytest.approx(expected, rel=1e-5)


def test_fit_is_ridge_regression(block):
    block, words, image = block
    targets = mean_vectors(block, words, image, PAD)
    views = [torch.rand(5, H), torch.rand(5, H)]
    fit(block, views, targets, ridge=1e-9)
    q = torch.cat([torch.cat(views), torch.ones(10, 1)], 1).double().numpy()
    expected = np.linalg.lstsq(q, np.concatenate([targets.toarray()] * 2), rcond=None)[0]
    np.testing.assert_allclose(block.weight, expected[:H].T, atol=1e-3)
    np.testing.assert_allclose(block.bias, expected[H], atol=1e-3)
    fit(block, views, targets, ridge=1e9)
    np.testing.assert_allclose(block.bias, targets.toarray().mean(0), atol=1e-5)


def test_rerank_asks_for_the_expected_cider(model, pixel_values, block, tmp_path):
    block = PhraseBlock(len(block[0].numbers), model.config.rbm_hidden_size, model.config.text_config.vocab_size)
    numbers = torch.cat([ngram_numbers(torch.arange(5, 44)[None], n, (), VOCAB + 1)[0][0] for n in (1, 2)])
    block.numbers.copy_(numbers[: len(block.numbers)].sort().values)
    for part in (block.idf, block.weight, block.bias):
        part.copy_(torch.rand_like(part))
    block.unknown_idf.fill_(1.0)
    block.length_factor.copy_(torch.rand(65))
    with pytest.raises(ValueError, match="rbm_rerank_cider is 2.0, but this RBM has no phrases"):
        model.decoding_settings(rbm_rerank_cider=2.0)
    model.set_phrases(block)
    model.generation_config.rbm_rerank_cider, model.generation_config.rbm_rerank_candidates = 1e3, 7
    encoding = model.encode_image(pixel_values)
    candidates = model.generate(encoding=encoding, num_beams=7, num_return_sequences=7, max_new_tokens=9)
    parts = model.candidate_parts(encoding, candidates)
    best = parts["cider"].argmax(1)
    chosen = model.generate(encoding=encoding, rbm_rerank=True, max_new_tokens=9)
    expected = candidates.view(5, 7, -1)[torch.arange(5), best]
    assert (best > 0).any() and torch.equal(chosen, expected[:, : chosen.shape[1]])
    text = model.config.text_config
    special = (text.pad_token_id, text.sep_token_id, text.bos_token_id)
    for i in range(5):  # an image alone, a caption alone
        alone = block.expected_cider(
            torch.sigmoid(encoding.hidden_input[i : i + 1]), candidates.view(5, 7, -1)[i : i + 1, 3:4], special
        )
        torch.testing.assert_close(alone[0, 0], parts["cider"][i, 3])

    model.save_pretrained(tmp_path)
    loaded = BlipRBMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.candidate_parts(encoding, candidates)["cider"], parts["cider"])
    half = loaded.to(torch.bfloat16)
    out = half.generate(pixel_values, rbm_rerank=True, max_new_tokens=9, return_dict_in_generate=True)
    assert out.rerank_scores.isfinite().all()
    got = half.rbm_layer.phrases.expected_cider(
        torch.sigmoid(encoding.hidden_input), candidates.view(5, 7, -1), special
    )
    torch.testing.assert_close(got.float(), parts["cider"], atol=0.02, rtol=0.02)
    model.generation_config.rbm_rerank_rarity = 1.0
    model.set_phrases(None)
    settings = model.generation_config
    assert model.config.rbm_num_phrases == settings.rbm_rerank_cider == settings.rbm_rerank_rarity == 0
    assert "cider" not in model.candidate_parts(encoding, candidates)


def test_phrases_of_a_larger_vocabulary(model, pixel_values, tmp_path):
    """New tokens behind the others: the same phrases, also after saving, when the numbers are read with the new base."""
    vocab_size = model.config.text_config.vocab_size
    numbers = torch.cat([ngram_numbers(torch.arange(5, 16)[None], n, (), vocab_size + 1)[0][0] for n in (1, 2, 3)])
    block = PhraseBlock(len(numbers), model.config.rbm_hidden_size, vocab_size)
    block.numbers.copy_(numbers.sort().values)
    for part in (block.idf, block.weight, block.bias, block.length_factor):
        part.copy_(torch.rand_like(part))
    model.set_phrases(block)
    encoding = model.encode_image(pixel_values)
    captions = torch.randint(5, 16, (5 * 3, 7))
    expected = model.candidate_parts(encoding, captions)
    model.resize_token_embeddings(vocab_size + 13, pad_to_multiple_of=7)
    model.save_pretrained(tmp_path)
    for again in (model, BlipRBMForConditionalGeneration.from_pretrained(tmp_path).eval()):
        parts = again.candidate_parts(encoding, captions)
        for name in ("cider", "rarity", "pmi"):
            torch.testing.assert_close(parts[name], expected[name])
    with pytest.raises(ValueError, match="but the vocabulary would have 7 tokens"):
        model.resize_token_embeddings(7)
