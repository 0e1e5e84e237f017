"""Alignment: losses in pieces against whole ones, the stages on drawn images, retrieval and matching by energy,
CapFilt."""

import itertools
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, BitImageProcessor

from experiments.alignment.evaluate_alignment import SIMILARITIES, class_of_images
from experiments.retrieval import rerank_retrieval
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMForImageTextRetrieval, BlipRBMProcessor
from modeling_blip_rbm.rbm import RBMParameters, pairwise_mutual_information, pointwise_mutual_information
from tests.conftest import REPO, WORD_IDS
from tests.stages import in_process, succeed
from training import capfilt
from training.align import AlignmentData, embed
from training.capfilt import shuffled
from training.lib.aligned import AlignedTokens, Projection, load_image_layer
from training.lib.contrastive import info_nce, info_nce_in_pieces, sigmoid_in_pieces, sigmoid_loss
from training.lib.data import split_held_back
from training.lib.encoders import LayersOfTower, VisionEncoder
from training.lib.pairs import load_pairs
from training.lib.retrieval import recalls, without_hubs


# ---------------------------------------------------------------- losses


@pytest.fixture
def batch():
    """7 images, 1 to 3 texts each; embeddings, owners, scale and bias, in double precision."""
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6])
    image, text = (F.normalize(torch.randn(n, 5, dtype=torch.double), dim=-1).requires_grad_() for n in (7, 11))
    scale, bias = (torch.tensor(x, dtype=torch.double, requires_grad=True) for x in (7.0, -2.0))
    return image, text, torch.arange(7), owner, scale, bias


def whole(kind, image, text, image_owner, text_owner, scale, bias):
    if kind == "sigmoid":
        return sigmoid_loss(image, text, image_owner, text_owner, scale, bias)
    return info_nce(scale * image @ text.T + bias, image_owner, text_owner)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
def test_losses_in_pieces_are_the_whole_ones(batch, kind, chunk):
    inputs = [t for t in batch if t.requires_grad]
    expected = whole(kind, *batch)
    got = (sigmoid_in_pieces if kind == "sigmoid" else info_nce_in_pieces)(*batch, chunk)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(3 * expected, inputs, retain_graph=True)
    for g, e in zip(torch.autograd.grad(3 * got, inputs, allow_unused=True), gradients):
        torch.testing.assert_close(torch.zeros_like(e) if g is None else g, e)


def test_an_images_other_texts_are_no_negatives(batch):
    """By hand, from the definitions: whatever the texts of an image are like to one another changes nothing."""
    image, text, image_owner, owner, scale, bias = batch
    s = (scale * image @ text.T + bias).detach()
    expected = 0.0
    for k, i in enumerate(owner.tolist()):
        others = [j for j in range(11) if owner[j] != i]
        expected -= (s[i, k] - torch.logsumexp(torch.stack([s[i, k], *s[i, others]]), 0)) / 22
        expected -= (s[i, k] - torch.logsumexp(s[:, k], 0)) / 22
    torch.testing.assert_close(whole("infonce", *batch).detach(), expected)
    signed = torch.where(owner == image_owner[:, None], s, -s)
    torch.testing.assert_close(whole("sigmoid", *batch).detach(), -F.logsigmoid(signed).sum() / 7)


def test_pairwise_information_is_the_pointwise_one():
    """In both of its computations, with gradients; inputs of up to a hundred overflow an exponential."""
    for size in (0.7, 30.0):
        p = RBMParameters(c=torch.randn(13), U=size * torch.randn(17, 13), b=torch.randn(17))
        p = RBMParameters(*(None if t is None else t.double().requires_grad_() for t in p))
        a, w = torch.randn(5, 13, dtype=torch.double, requires_grad=True), torch.rand(7, 17).round().double()
        expected = pointwise_mutual_information(p, a[:, None], w[None])
        got = pairwise_mutual_information(p, a, w)
        torch.testing.assert_close(got, expected)
        weight = torch.randn(5, 7, dtype=torch.double)
        gradients = [torch.autograd.grad((x * weight).sum(), (a, p.U, p.c)) for x in (got, expected)]
        for g, e in zip(*gradients):
            torch.testing.assert_close(g, e)


def test_recalls_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.8, 0.2, 0.1, 0.9], [0.95, 0.3, 0.4, 0.1]])
    measured = recalls(similarity, torch.tensor([0, 0, 1, 2]))  # image 0 has two captions, images 1 and 2 one each
    assert measured["image_to_text_r1"] == pytest.approx(100 / 3)  # image 1's is last, image 2's has four better
    assert measured["text_to_image_r1"] == 0.0 and measured["text_to_image_r5"] == 100.0
    assert measured["text_to_image_median_rank"] == 3.0


def test_similarities():
    a, b = torch.randn(3, 5).numpy(), torch.randn(4, 5).numpy()
    for name, like in SIMILARITIES.items():
        matrix = like(np.concatenate([a, b]), a)
        assert matrix.shape == (7, 3) and (matrix[:3].argmax(0) == np.arange(3)).all(), name
    from scipy.stats import entropy

    p, q = (torch.tensor(x, dtype=torch.double).div(0.05).softmax(-1).numpy() for x in (a, b))
    assert SIMILARITIES["kullback_leibler"](a, b)[1, 2] == pytest.approx(-entropy(p[1], q[2]))


def test_classes_are_what_captions_agree_on():
    captions = [["a dog", "the dog runs", "an animal"], ["a dog", "a cat"], ["a dog and a horse", "a dog", "a dog"]]
    assert class_of_images(captions, ["dog", "horse"]).tolist() == [0, -1, -1]


# ---------------------------------------------------------------- stages


def test_layers_of_a_tower(towers):
    encoder = VisionEncoder(f"{towers}/vision@0,2")
    pixels = torch.randn(3, 3, 28, 28)
    states = encoder.tower.tower(pixels, output_hidden_states=True).hidden_states
    tokens = encoder.tower(pixels).last_hidden_state
    torch.testing.assert_close(tokens, torch.cat([states[0], states[2]], -1))
    pooled = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)  # each layer's columns are what it would give alone
    alone = torch.cat([states[2][:, 0], states[2][:, 1:].mean(1)], -1)
    torch.testing.assert_close(pooled[:, encoder.parts["vision@2"]], alone)
    with pytest.raises(ValueError, match=r"layers are \[3\], but this tower has 0 \(embeddings\) to 2"):
        LayersOfTower(encoder.tower.tower, [3])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("alignment")


@pytest.fixture(scope="module")
def aligned(pairs, towers, work):
    common = ["--vision", towers / "vision", f"{towers}/vision@1", "--text", towers / "text", "--dataset", pairs]
    common += [
        "--held_back",
        8,
        "--cache_dir",
        work / "features",
        "--epochs",
        40,
        "--eval_every",
        20,
        "--batch_size",
        8,
    ]
    common += ["--dim", 13, "--hidden_size", 23, "--num_words", 9, "--learning_rate", 1e-2, "--dropout", 0.1]
    for kind, loss in (("probe", "infonce"), ("sail", "sigmoid"), ("rbm", "infonce")):
        in_process("align", *common, "--kind", kind, "--loss", loss, "--output_dir", kind, cwd=work)
    return work, common


def test_alignment_learns_and_goes_on(aligned, pairs):
    work, common = aligned
    command = [
        "--runs",
        "probe",
        "sail",
        "rbm",
        "--dataset",
        pairs,
        "--output",
        "result.json",
        "--classes",
        *"red blue black".split(),
    ]
    out = in_process("experiments.alignment.evaluate_alignment", *command, "--cache_dir", work / "features", cwd=work)
    runs = json.loads((work / "result.json").read_text())["runs"]
    assert set(runs) == {"probe", "sail", "rbm", "together"} and "| sail |" in out
    for name, entry in runs.items():  # 8 images of 4 colours: two of each cannot be told apart
        assert entry["text_to_image_r5"] > 80 and entry["image_to_text_r5"] > 60, (name, entry)
    assert runs["sail"]["zero_shot"]["accuracy"] >= 0.6 and set(runs["sail"]["similarities"]) == set(SIMILARITIES)
    again = [*common, "--kind", "probe", "--output_dir", "probe", "--epochs", 60]
    in_process("align", *again, cwd=work)
    history = json.loads((work / "probe" / "align.json").read_text())["held_back"]
    assert [entry["epoch"] for entry in history] == [20, 40, 60]


def test_alignment_on_all_images(aligned, pairs, saved_model):
    """None held back: the last epoch stays; retrieval in two steps chooses its weights by one run and looks with the
    other."""
    work, common = aligned
    all_images = [*common, "--kind", "probe", "--held_back", 0, "--epochs", 3, "--output_dir", "all"]
    out = in_process("align", *all_images, cwd=work)
    report = json.loads((work / "all" / "align.json").read_text())
    history = report["held_back"]
    assert [entry["epoch"] for entry in history] == [3] and set(history[0]) == {"epoch", "loss"} and "epoch" in out
    command = ["--runs", "probe", "--captioners", saved_model, "--candidates", 2, "--dataset", pairs]
    command += ["--dtype", "float32", "--bank_candidates", 2, "--cache_dir", "all/features"]
    results = []
    for number, more in enumerate(([], ["--final_runs", "all"])):
        in_process(
            "experiments.retrieval.rerank_retrieval", *command, *more, "--output", f"all/{number}.json", cwd=work
        )
        results.append(json.loads((work / "all" / f"{number}.json").read_text()))
    assert results[0]["held_back"] == results[1]["held_back"]
    assert results[1]["core_minutes_of_training"] == report["minutes"] * report["threads"]
    with pytest.raises(SystemExit):
        in_process(
            "experiments.retrieval.rerank_retrieval",
            *command,
            "--final_runs",
            "all",
            "all",
            "--output",
            "all/2.json",
            cwd=work,
        )
    with pytest.raises(ValueError, match="all held no image back"):
        in_process(
            "experiments.retrieval.rerank_retrieval", *command, "--runs", "all", "--output", "all/2.json", cwd=work
        )


def test_the_views_of_an_image_are_one():
    views = torch.randn(3, 4, 5)  # of 4 images
    store = SimpleNamespace(num_views=3, batch=lambda rows, view: views[view][rows])
    starts, sentences = np.array([0, 2, 3, 6, 7]), np.random.default_rng(0).normal(size=(7, 11))
    data = AlignmentData([store], [np.arange(5)], sentences, None, starts, np.arange(4), captions=1, seed=0)
    aligner = Projection(5, 11, 3, None, 0.5, "infonce")
    images, texts, owner = embed(aligner, data, np.array([1, 3]))
    all_three = aligner.embed_images(views[:, [1, 3]].flatten(0, 1)).view(3, 2, 3)
    torch.testing.assert_close(images, all_three.mean(0))
    assert owner.tolist() == [0, 1] and texts.shape == (2, 3)


def test_hubs_are_taken_off():
    """From the definition; and the caption that is like every image is no longer every image's best."""
    similarity, bank_images, bank_captions = torch.randn(5, 7), torch.randn(11, 7), torch.randn(5, 13)
    similarity[:, 3], bank_images[:, 3] = 4, 4
    ours = without_hubs(similarity, bank_images, bank_captions, temperature=2.0, weight=0.5)
    usual = torch.log(torch.exp(2 * bank_images).mean(0)) / 2
    usual = usual + torch.log(torch.exp(2 * bank_captions).mean(1))[:, None] / 2
    torch.testing.assert_close(ours, similarity - 0.5 * usual)
    assert (similarity.argmax(1) == 3).all()
    assert (without_hubs(similarity, bank_images, bank_captions).argmax(1) != 3).any()


def test_a_second_look_with_the_captioner(aligned, pairs, saved_model):
    """One process, and two that share the images: the same results, and the same likelihoods kept."""
    work, _ = aligned
    common = ["--runs", "probe", "rbm", "--captioners", saved_model, saved_model, "--dataset", pairs]
    common += ["--candidates", 3, 2, "--likelihood_bank", 6, "--bank_candidates", 2, "--dtype", "float32"]
    one = [*common, "--cache_dir", "one", "--output", "one.json"]
    out = in_process("experiments.retrieval.rerank_retrieval", *one, cwd=work)
    results = json.loads((work / "one.json").read_text())
    assert set(results["held_back"]) == set(results["runs"]) == set(results["ways"]) and len(results["ways"]) == 4
    assert "| hubs and likelihood |" in out and results["captions"] == 24
    together, *others = [sum(v for k, v in entry.items() if "_r" in k) for entry in results["held_back"].values()]
    assert np.isfinite([together, *others]).all()

    shutil.copytree(work / "one", work / "two", ignore=shutil.ignore_patterns("likelihood-*"))
    two = [*common, "--cache_dir", "two", "--output", "two.json"]
    succeed(
        "experiments.retrieval.rerank_retrieval",
        *two,
        cwd=work,
        launcher=("--config_file", REPO / "training/accelerate/multi-cpu.yaml"),
    )
    for way, entry in json.loads((work / "two.json").read_text())["runs"].items():
        assert entry == pytest.approx(results["runs"][way])
    files = sorted((work / "one").glob("likelihood-*.npy"))
    assert len(files) == 4  # candidates and bank, of the held-back images and of the split
    for file in files:
        np.testing.assert_allclose(np.load(work / "two" / file.name), np.load(file), atol=1e-3)


@torch.no_grad()
def test_likelihoods_are_of_the_pairs_asked_for(pairs, saved_model, tmp_path):
    """Against one caption of one image at a time."""
    dataset = load_pairs(pairs, "train")
    gallery = rerank_retrieval.Gallery(dataset, np.array([2, 5, 11]))
    likelihoods = rerank_retrieval.Likelihoods(str(saved_model), tmp_path, batch_size=2, dtype="float32")
    ids = likelihoods.token_ids(gallery)
    assert len(ids) == 9 and len({len(row) for row in ids}) > 1
    asked = torch.rand(3, 9) < 0.5
    asked[1] = False
    store, model = likelihoods.features(dataset), likelihoods.model
    found = likelihoods.of_pairs(store, gallery.rows, ids, asked, "")
    assert torch.equal(found.isnan(), ~asked)
    for image, caption in asked.nonzero().tolist():
        encoding = model.encode_image(vision_hidden_states=store.batch([gallery.rows[image]]), rbm=False)
        expected, _ = model.score_captions(encoding, ids[caption][None])
        torch.testing.assert_close(found[image, caption], expected[0], atol=1e-3, rtol=1e-4)

    with mock.patch.object(model, "score_captions", side_effect=AssertionError("asked again")):
        torch.testing.assert_close(likelihoods.of_pairs(store, gallery.rows, ids, asked, ""), found, equal_nan=True)
        with pytest.raises(AssertionError, match="asked again"):  # of a pair that is new
            likelihoods.of_pairs(store, gallery.rows, ids, torch.ones_like(asked), "")

    # a second captioner, asked of one pair less, says 2 nats more
    again = asked.clone()
    again[tuple(asked.nonzero()[0])] = False
    gallery.similarity, gallery.gains = torch.zeros(3, 9), [found + 3, torch.where(again, found + 5, float("nan"))]
    score = gallery.score(likelihood_weight=0.5)
    torch.testing.assert_close(score[again], 0.5 * (found[again] + 4) + 200, atol=1e-3, rtol=0)
    torch.testing.assert_close(score[asked & ~again], 0.5 * (found[asked & ~again] + 3) + 100, atol=1e-3, rtol=0)
    assert score[~asked].max() < score[asked & ~again].min() < score[again].min()


def test_study_of_encoders(work, pairs, towers):
    command = [
        "--study",
        "--vision",
        f"{towers}/vision@0,1,2",
        towers / "vision",
        "--text",
        towers / "text",
        "--dataset",
        pairs,
    ]
    command += ["--classes", "red", "blue", "black", "white", "--epochs", 3, "--output", "study.json"]
    with pytest.raises(ValueError, match="held_back is 400"):
        in_process("experiments.alignment.evaluate_alignment", *command, cwd=work)
    in_process(
        "experiments.alignment.evaluate_alignment",
        *command,
        "--held_back",
        4,
        "--cache_dir",
        work / "features",
        cwd=work,
    )
    study = json.loads((work / "study.json").read_text())
    assert set(study["encoders"]) == {"vision@0", "vision@1", "vision@2", "vision", "all together"}
    assert all(0 <= entry["knn"] <= 1 and 0 <= entry["linear"] <= 1 for entry in study["encoders"].values())
    assert set(study["correlation_with_alignment"]) == {"knn", "linear"} and (work / "study.png").exists()


def test_captioner_on_aligned_tokens(work, pairs, towers):
    """Its way from image to words alone is trained, on tokens of the width of the aligned space."""
    layer = ["--vision", towers / "vision", "--text", towers / "text", "--dataset", pairs, "--held_back", 8]
    layer += ["--cache_dir", work / "features", "--epochs", 2, "--batch_size", 8, "--dim", 13]
    in_process("align", *layer, "--output_dir", "one-tower", cwd=work)
    with pytest.raises(SystemExit):
        in_process("build_captioner", "--vision", "v", "--text", "t", "--aligned", "a", "--output_dir", "o", cwd=work)
    start = ["--vision", towers / "vision", "--output_dir"]
    in_process("build_captioner", *start, "trained", "--text", towers / "text", cwd=work)
    in_process("build_captioner", *start, "start", "--decoder", "trained", "--aligned", "one-tower", cwd=work)
    train = ["--model", "start", "--parts", "cross_attention", "--aligned", "one-tower", "--dataset", pairs]
    train += ["--held_back", 8, "--views", 1, "--cache_dir", work / "features", "--output_dir", "captioner"]
    train += ["--num_train_epochs", 1, "--eval_strategy", "epoch", "--save_strategy", "epoch", "--learning_rate", 1e-3]
    with pytest.raises(ValueError, match="--aligned and --tower_learning_rate exclude each other"):
        in_process("train_captioner", *train, "--tower_learning_rate", 1e-3, cwd=work)
    in_process("train_captioner", *train, "--unigram_bias", "false", "--ema_decay", 0.5, cwd=work)
    before, after = (
        BlipRBMForConditionalGeneration.from_pretrained(work / name).state_dict()
        for name in ("start", "captioner/last")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("projector" in name or "crossattention" in name for name in changed)
    assert before["projector.linear.weight"].shape[1] == 13

    tokens = torch.randn(2, 5, 22)  # a CLS token and 4 patches
    layer = load_image_layer(work / "one-tower")
    expected = layer(torch.cat([tokens[:, 0], tokens[:, 3]], 1))
    torch.testing.assert_close(AlignedTokens(mock.Mock(), layer).aligned(tokens)[:, 3], expected)


def test_image_layer_of_an_rbm_or_of_two_towers_is_refused(aligned):
    work, _ = aligned
    with pytest.raises(ValueError, match="kind 'rbm' on 2 towers; aligned tokens need probe or sail on one"):
        load_image_layer(work / "rbm")


# ---------------------------------------------------------------- retrieval and matching by energy, CapFilt


def test_retrieval_model_is_the_captioners_rbm(saved_model, model, processor, pixel_values):
    for load in (BlipRBMForImageTextRetrieval, AutoModelForZeroShotImageClassification):
        retrieval = load.from_pretrained(saved_model, trust_remote_code=True).eval()
        assert isinstance(retrieval, BlipRBMForImageTextRetrieval) and not hasattr(retrieval, "text_decoder")
    texts = processor(text=["a dog on the beach", "red ball", "two people"])
    output = retrieval(pixel_values, **texts)
    p = model.rbm_layer.rbm.parameters_fp32
    w = torch.zeros(3, len(WORD_IDS))
    for row, said in zip(w, (("dog", "beach"), ("red", "ball"), ())):
        row[[processor.tokenizer.convert_ids_to_tokens(WORD_IDS).index(word) for word in said]] = 1
    a = model.encode_image(pixel_values).hidden_input
    expected = pointwise_mutual_information(p, a[:, None], w[None])
    torch.testing.assert_close(output.logits_per_image, expected, rtol=1e-4, atol=1e-4)
    assert output.match_probability is None and torch.equal(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.image_free_energy, model.image_free_energy(pixel_values))
    with pytest.raises(ValueError, match="rbm_match is None: fit the matching head"):
        retrieval.match_probability(expected)
    retrieval.config.rbm_match = [0.3, 2.0]
    torch.testing.assert_close(
        retrieval(pixel_values, **texts).match_probability, torch.sigmoid(0.3 + 2 * expected), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="give either pixel_values or vision_hidden_states"):
        retrieval(**texts)


def test_shuffling_exchanges_the_share_that_is_asked_for():
    captions = [[f"{i} {k}" for k in range(5)] for i in range(11)]
    noisy, wrong = shuffled(captions, 0.4, seed=0)
    assert sorted(itertools.chain(*noisy)) == sorted(itertools.chain(*captions))
    moved = [[text.split()[0] != str(i) for text in of_image] for i, of_image in enumerate(noisy)]
    assert (np.array(moved) == np.array(wrong)).all() and np.array(wrong).sum() == 22


def test_capfilt_of_a_captioner_without_rbm(pairs, towers, tmp_path):
    """Exchanged captions are found all the same, by new RBMs over the commonest words; without exchange there is
    nothing to judge by."""
    tower = ["--vision", towers / "vision", "--text", towers / "text"]
    in_process("build_captioner", *tower, "--output_dir", "bare", cwd=tmp_path)
    command = ["--model", "bare", "--dataset", pairs, "--held_back", 4, "--views", 1]
    with pytest.raises(ValueError, match="bare has no RBM that knows words: train one first"):
        in_process("capfilt", *command, "--output_dir", "refused", cwd=tmp_path)
    noisy = ["--shuffle", 0.3, "--epochs", 2, "--batch_size", 6, "--synthetic", True, "--least", 0.0]
    in_process("capfilt", *command, *noisy, "--output_dir", "found", cwd=tmp_path)
    report = json.loads((tmp_path / "found" / "capfilt.json").read_text())
    assert report["kept"] == report["captions"] and report["synthetic_kept"] == 0  # nothing lost, nothing to replace


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_share_of_wrong_captions_is_found(share):
    """Of two normal distributions the log-odds are known exactly."""
    rng = np.random.default_rng(0)
    wrong = rng.random(4001) < share
    own = rng.normal(np.where(wrong, 0.0, 3.0))
    (bias, weight), found = capfilt.fit_mixture(own, rng.normal(size=4003))
    exact = (-4.5 + np.log((1 - share) / share), 3.0)  # log N(e; 3, 1) / N(e; 0, 1) = 3 e - 9/2, and that of the shares
    assert abs(found - share) < 0.05
    assert abs(weight - exact[1]) < 0.3 and abs(-bias / weight - -exact[0] / exact[1]) < 0.1  # where a chance is a half
    assert np.isfinite(capfilt.fit_mixture(own[~wrong] + 9, own[wrong])[0]).all()  # nothing is wrong


@pytest.fixture
def few_captions(monkeypatch):
    """A mixture cannot be told from 18 captions: the held-back ones are taken for right."""
    monkeypatch.setattr(capfilt, "fit_mixture", lambda own, other: (capfilt.fit_head(own, other)[0], 0.0))


def test_capfilt_once_more_on_what_is_left(saved_model, pairs, tmp_path, few_captions):
    command = ["--model", saved_model, "--dataset", pairs, "--cache_dir", "features", "--held_back", 6, "--views", 1]
    command += ["--shuffle", 0.3, "--epochs", 60, "--batch_size", 6, "--rounds"]
    with mock.patch("training.capfilt.rbm_of_noisy_pairs", wraps=capfilt.rbm_of_noisy_pairs) as train:
        in_process("capfilt", *command, 2, "--output_dir", "twice", cwd=tmp_path)
    images = [set(call.args[3].tolist()) for call in train.call_args_list]
    captions = [sum(len(call.args[2][i]) for i in own) for call, own in zip(train.call_args_list, images)]
    assert len(images) == 4 and not images[0] & images[1] and not images[2] & images[3]
    assert images[2] <= images[0] and images[3] <= images[1]  # still the half that is not judged
    assert 0 < captions[2] < captions[0] and 0 < captions[3] < captions[1]
    with pytest.raises(ValueError, match="--least 1.1 leaves no caption"):
        in_process("capfilt", *command, 2, "--least", 1.1, "--output_dir", "none", cwd=tmp_path)
    with pytest.raises(ValueError, match="no caption is right with a chance of --least 1.1"):
        in_process("capfilt", *command, 1, "--least", 1.1, "--output_dir", "nothing", cwd=tmp_path)
    with pytest.raises(ValueError, match="--rounds is 2, but must be"):
        in_process("capfilt", *command, 2, "--shuffle", 0, "--output_dir", "none", cwd=tmp_path)


def test_capfilt(saved_model, pairs, tmp_path, few_captions):
    command = ["--model", saved_model, "--dataset", pairs, "--cache_dir", "features", "--held_back", 6, "--views", 1]
    in_process(
        "capfilt", *command, "--output_dir", "noisy", "--shuffle", 0.3, "--epochs", 60, "--batch_size", 6, cwd=tmp_path
    )
    report = json.loads((tmp_path / "noisy" / "capfilt.json").read_text())
    # a quarter of the exchanged captions are of the same colour, and so not wrong
    assert report["auc_of_wrong_captions"] > 0.6 and report["share_right_after"] > report["share_right_before"]
    kept, before = (load_pairs(str(tmp_path / name), "train") for name in ("noisy", "noisy-noisy"))  # as a stage does
    # and the 6 held-back images with 3 captions each, as they were: the next stage holds them back again
    assert len(kept) == report["images_kept"] + 6 and len(before) == 24
    assert sum(map(len, kept["captions"])) - 18 == report["kept"] < report["captions"] == 54
    assert sum(map(len, before["captions"])) == 72
    held = [{data["image_id"][i] for i in split_held_back(data, 6)[1]} for data in (kept, before)]
    assert held[0] == held[1]
    in_process("capfilt", *command, "--output_dir", "filtered", "--synthetic", True, "--least", 0.4, cwd=tmp_path)
    head = json.loads((saved_model / "config.json").read_text())["rbm_match"]
    assert head == json.loads((tmp_path / "filtered" / "capfilt.json").read_text())["matching_head"]
    cross_fitted = [*command, "--cross_fit", True, "--epochs", 20, "--batch_size", 6, "--output_dir", "cross"]
    with mock.patch("training.capfilt.rbm_of_noisy_pairs", wraps=capfilt.rbm_of_noisy_pairs) as train:
        in_process("capfilt", *cross_fitted, cwd=tmp_path)
    halves = [set(call.args[3].tolist()) for call in train.call_args_list]
    assert len(halves) == 2 and not halves[0] & halves[1] and len(halves[0] | halves[1]) == 18


def test_a_captioner_on_the_first_layers_of_a_tower(towers, tmp_path):
    """NAME@1: the state after one layer, of the whole image, where the processor of the tower would cut its borders
    off."""
    tower = AutoModel.from_pretrained(towers / "vision")
    tower.save_pretrained(tmp_path / "vision")
    crop = BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 21, "width": 21}, do_center_crop=True)
    crop.save_pretrained(tmp_path / "vision")
    command = ["--vision", "vision@1", "--text", towers / "text", "--output_dir", "captioner"]
    in_process("build_captioner", *command, cwd=tmp_path)
    model = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    assert model.config.vision_config.num_hidden_layers == 1 and model.config.num_image_tokens == 1 + 3 * 3
    processor = BlipRBMProcessor.from_pretrained(tmp_path / "captioner")
    image = np.full((47, 47, 3), 255, np.uint8)
    image[4:-4, 4:-4] = 0  # a frame at the border
    pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (21, 21) and (pixels[..., 0, :] > 0).all()
    with torch.no_grad():
        state = tower(pixels, output_hidden_states=True).hidden_states[1]
        expected = model.projector(tower.layernorm(state))
        torch.testing.assert_close(model.encode_image(pixels, rbm=False).image_embeds, expected)
