"""Few pairs: planted causes that images without captions and captions without images show, the controls' weights, and every question."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from experiments.few_pairs.__main__ import NoisyPairs, read_labels
from experiments.few_pairs.learning import (
    SPACE,
    Material,
    World,
    build,
    fit,
    measure,
    overall_quality,
    read_candidates,
    reranked,
    tries,
)
from experiments.few_pairs.questions import (
    SAID,
    auc_interval,
    few_pairs,
    half_said,
    hybrid,
    said_hidden_size,
    said_system,
    words_said,
    wrong_captions,
)
from experiments.few_pairs.report import write_report
from experiments.few_pairs.systems import RandomCauses, text_axes
from tests.stages import in_process
from training.lib.data import CaptionWords, split_held_back
from training.lib.metrics import CiderD
from training.lib.pairs import load_pairs
from training.lib.rbm_objective import RBMArguments


V, K, CAUSES = 23, 29, 5


class Store:
    """Pooled images in memory, two views."""

    def __init__(self, views):
        self.views = views

    shape = property(lambda self: self.views.shape)
    num_views = property(lambda self: self.views.shape[1])

    def batch(self, rows, view=0):
        return self.views[torch.as_tensor(rows), torch.as_tensor(view).expand(len(rows))]


def as_words(w):
    return CaptionWords(([of_image.nonzero()[0].tolist()] for of_image in w.numpy()), list(range(K)), K)


@pytest.fixture(scope="module")
def material():
    """Images and words that share five rare binary causes; an image is noise but for them, and so is a caption."""
    g = torch.Generator().manual_seed(7)
    n = 1301
    h = (torch.rand(n, CAUSES, generator=g) < 0.3).float()
    images = h @ (2 * torch.randn(CAUSES, V, generator=g)) + torch.randn(n, V, generator=g)
    views = torch.stack([images, images + 0.1 * torch.randn(n, V, generator=g)], 1)
    odds = 5 * h[:, torch.arange(K) % CAUSES] - 4
    w = (torch.rand(n, K, generator=g) < torch.sigmoid(odds)).float()
    causes = (torch.rand(2003, CAUSES, generator=g) < 0.3).float()
    texts = (torch.rand(2003, K, generator=g) < torch.sigmoid(5 * causes[:, torch.arange(K) % CAUSES] - 4)).float()
    held, world = np.arange(0, 101), np.arange(101, 300)
    store, words = Store(views), as_words(w)
    part = lambda rows: World(store.batch(rows), [words[row] for row in rows])
    settings = RBMArguments("", "", batch_size=13, num_words=K, learning_rate=3e-3, weight_decay=0.01)
    return Material(store, np.arange(300, n), words, as_words(texts), part(held), {"planted": part(world)}, settings)


def planted_setting(material, name, cd, rows, steps=200, hidden_size=11):
    torch.manual_seed(0)
    settings = RBMArguments("", "", batch_size=17, hidden_size=hidden_size, learning_rate=1e-2, cd=cd, init_std=0.1)
    system = build(name, material, rows, settings, {})
    fit(system, material.store, material.words, rows, overall_quality(material.held_back), steps)
    return {key: value.mean() for key, value in measure(system, material.worlds["planted"]).items()}


def test_unpaired_data_help_where_they_must(material):
    few = material.rows[:17]
    alone, with_unpaired = (
        planted_setting(material, name, cd, few) for name, cd in (("rbm", 0.0), ("rbm, unpaired", 1.0))
    )
    assert with_unpaired["word_ap"] > alone["word_ap"] + 0.04
    assert with_unpaired["log_likelihood"] > alone["log_likelihood"] + 1


def weights(system) -> int:
    return sum(p.numel() for name, p in system.named_parameters() if name.endswith("_weight"))


def test_systems_have_equal_weights(material):
    """By hand: 23 * 29 weights of a linear map are 13 * (23 + 29) within a unit's; (23 + 29) * 29 with said words, 29 (23 + 29), 19 (23 + 58)."""
    settings = RBMArguments("", "", hidden_size=material.equal_hidden_size())
    built = [build(name, material, material.rows, settings, {}) for name in ("linear", "rbm", "rbm, unpaired", "mlp")]
    assert material.equal_hidden_size() == 13 and [weights(system) for system in built] == [667, 676, 676, 676]
    sizes = {name: said_hidden_size(name, material) for name in SAID}
    said = [said_system(name, material, material.rows, RBMArguments("", "", hidden_size=sizes[name])) for name in SAID]
    assert [weights(system) for system in said] == [1508, 667, 1508, 1539] and sizes["mlp, said"] == 19


def test_every_system_has_as_many_different_tries():
    for name in SPACE:
        drawn = tries(name, 7)
        assert len(drawn) == 7 == len({str(sorted(setting.items())) for setting in drawn})


def test_half_of_the_words_are_said():
    words = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    w, said, owner = half_said(World(torch.zeros(2, 3), [words[:1], words[1:]]))
    assert said.sum(1).tolist() == [2, 0] and (said <= w).all() and owner.tolist() == [0, 1]
    assert any(
        (half_said(World(None, [words]), seed)[1] != half_said(World(None, [words]))[1]).any() for seed in range(1, 5)
    )


def test_random_causes_are_as_active_as_asked():
    x = torch.randn(503, 7, generator=torch.Generator().manual_seed(1))
    causes = RandomCauses(x, 11, {"mean": 0.23, "input_std": 1.7})
    assert causes(x).mean(0).tolist() == pytest.approx([0.23] * 11, abs=1e-3)
    assert (x @ causes.W).std(0).tolist() == pytest.approx([1.7] * 11, abs=1e-3)


def test_axes_of_texts_are_eigenvectors_of_correlations():
    """Two words that come together and one by chance: by numpy, log-odds along the first axis are covariances over variances."""
    g = torch.Generator().manual_seed(2)
    first = (torch.rand(997, generator=g) < 0.4).float()
    w = torch.stack([first, first, (torch.rand(997, generator=g) < 0.3).float()], 1)
    axes = text_axes(CaptionWords(([row.nonzero()[0].tolist()] for row in w.numpy()), [0, 1, 2], 3), size=101)
    vectors = np.linalg.eigh(np.corrcoef(w.numpy().T))[1]
    factor = (w.numpy() - w.numpy().mean(0)) / w.numpy().std(0) @ vectors[:, -1]
    slopes = np.array(
        [np.mean(factor * (w[:, k].numpy() - w[:, k].numpy().mean())) / w[:, k].numpy().var() for k in range(3)]
    )
    found = axes[-1].numpy()
    assert abs(found @ slopes) == pytest.approx(np.linalg.norm(found) * np.linalg.norm(slopes), rel=1e-4)
    assert axes.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-5)


def test_candidates_are_read_and_reranked(tmp_path):
    """By hand: the second candidate is likelier a token; with a weight of 1 its lower information loses to the first's."""
    sequences = torch.tensor([[[2, 3, 0], [1, 1, 4]]])
    processor = SimpleNamespace(
        tokenizer=range(7), captions=lambda ids: ["a dog" if 3 in row else "cats" for row in ids.tolist()]
    )
    references = {2: ["two cats", "cats"], 5: ["a dog", "a dog"], 11: ["birds", "a bird"]}
    numbers = {"log_prob": [[-6.0, -4.0]], "length": [[2, 4]], "rows": [5]}
    found = {"sequences": sequences} | {k: torch.tensor(v) for k, v in numbers.items()}
    torch.save(found | {"cider": torch.tensor([[70.0, 30.0]])}, tmp_path / "c.pt")
    read = lambda: read_candidates(tmp_path / "c.pt", [1, 3, 4], processor, references)
    candidates = read()
    assert candidates["words"].tolist() == [[[0, 1, 0], [1, 0, 1]]] and candidates["rows"].tolist() == [1]
    information = torch.tensor([[2.5, 0.0]])
    assert [reranked(information, candidates, weight).tolist() for weight in (0.0, 1.0)] == [[30.0], [70.0]]
    torch.save(found, tmp_path / "c.pt")
    expected = [[100 * CiderD(list(references.values())).score(1, text) for text in ("a dog", "cats")]]
    assert (
        read()["cider"].numpy() == pytest.approx(np.array(expected), rel=1e-6) and expected[0][0] > 100 > expected[0][1]
    )
    torch.save(found | {"rows": torch.tensor([3])}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="candidates of 1 images, which are not those of the 3 measured"):
        read()
    torch.save({"sequences": sequences}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="has no length, log_prob: it must be a file of candidates"):
        read()


def test_labels_of_what_is_not_there_are_refused(tmp_path):
    table = tmp_path / "judged.tsv"
    table.write_text("number\timage_id\tlabel\tjudge\n1\tb\tpartly\tme\n")
    assert read_labels(table, ["a", "b"]) == {1: "partly"}
    with pytest.raises(ValueError, match="image b is not among"):
        read_labels(table, ["a"])
    table.write_text("number\timage_id\tlabel\tjudge\n1\tb\t\tme\n")
    with pytest.raises(ValueError, match="pair 1 is '', but must be right, partly or wrong"):
        read_labels(table, ["b"])


def test_auc_and_its_interval():
    """Perfect evidence has an AUC of 1 in every resample, chance an interval around one half."""
    rng = np.random.default_rng(0)
    wrong = rng.random(401) < 0.3
    by_chance = rng.random(401)
    found = auc_interval(wrong, {"rbm": -1.0 * wrong, "linear": by_chance}, "rbm", 101)
    assert found["auc"]["rbm"] == {"auc": 1, "low": 1, "high": 1}
    chance = found["auc"]["linear"]
    assert chance["low"] < chance["auc"] < chance["high"] and chance["auc"] == roc_auc_score(wrong, -by_chance)
    assert found["differences"]["linear"]["low"] > 0.4


def test_all_questions_are_answered(material, tmp_path):
    """Small settings, all four questions and the report. A second run trains nothing."""
    args = SimpleNamespace(
        pairs=[17], said_pairs=[10_000], hybrid_pairs=[17], systems=list(SPACE), seeds=2, tries=2, steps=3, temperatures=11, resamples=31
    )  # fmt: skip
    held = material.held_back
    some = {
        "words": torch.stack([of_image.expand(3, -1) for of_image in held.words[:7]]).float(),
        "rows": torch.arange(7),
    }
    some |= {"log_prob": -torch.rand(7, 3), "length": torch.ones(7, 3), "cider": torch.rand(7, 3)}
    world = material.worlds["planted"]
    material.held_back = World(held.features, held.words, some)
    material.worlds = {"planted": World(world.features, world.words, some)}
    results = {"pairs": few_pairs(material, args, tmp_path)}
    assert set(results["pairs"]["means"]) == {"17"} and set(results["pairs"]["means"]["17"]) == set(SPACE)
    entry = results["pairs"]["differences"]["17"]["rbm, unpaired"]["linear"]
    assert entry["rerank_cider"]["low"] <= entry["rerank_cider"]["difference"] <= entry["rerank_cider"]["high"]
    results["said"] = words_said(material, args, tmp_path)
    assert set(results["said"]["means"]) == {"1001"}  # there are no more
    chosen = results["pairs"]["chosen"]
    part = np.arange(1301) % 2
    wrong = [np.array([row % 3 == 0]) for row in range(1301)]
    labels = {int(row): label for row, label in zip(material.rows, ["right", "wrong", "partly"] * 9)}
    noisy = NoisyPairs(material.words, wrong, np.arange(1301) % 2, part, ["even", "odd"], labels)
    results["noisy"] = wrong_captions(material, args, tmp_path, noisy, chosen["17"])
    assert results["noisy"]["labels"] == {"right": 9, "partly": 9, "wrong": 9}
    results["hybrid"] = hybrid(material, args, tmp_path, chosen)
    assert math.isfinite(results["hybrid"]["17"]["rbm, unpaired"]["3.0"]["density"])
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz") if "try" in file.name}
    again = few_pairs(material, args, tmp_path)
    assert again == results["pairs"] and files == {file: file.stat().st_mtime_ns for file in files}
    names = ("pairs", "said", "noisy", "hybrid")
    (tmp_path / "README.md").write_text("\n".join(f"<!-- few-{name} -->\n<!-- /few-{name} -->" for name in names))
    write_report(tmp_path, results)
    text = (tmp_path / "README.md").read_text()
    assert "| rbm, unpaired, minus |" in text and "Judged: 9 right, 9 partly, 9 wrong." in text
    assert (tmp_path / "pairs.png").stat().st_size > 1000 < (tmp_path / "hybrid.png").stat().st_size


def test_a_sheet_has_pages_and_an_empty_table(pairs, tmp_path):
    command = ["--dataset", pairs, "--held_back", 5, "--output", "sheet"]
    in_process("experiments.few_pairs.sheet", *command, "--pairs", 7, cwd=tmp_path)
    lines = [line.split("\t") for line in (tmp_path / "sheet" / "judged.tsv").read_text().splitlines()]
    assert lines[0] == ["number", "image_id", "label", "judge"] and [line[0] for line in lines[1:]] == list("1234567")
    train, _ = split_held_back(dataset := load_pairs(str(pairs), "train"), 5)
    assert len({line[1] for line in lines[1:]} & {dataset[int(row)]["image_id"] for row in train}) == 7
    assert [file.name for file in (tmp_path / "sheet").glob("*.png")] == ["page-01.png"]
    with pytest.raises(ValueError, match="--output sheet holds files"):
        in_process("experiments.few_pairs.sheet", *command, cwd=tmp_path)
    with pytest.raises(ValueError, match="--pairs 20: must be of 1 to 19"):
        in_process("experiments.few_pairs.sheet", *command[:-1], "other", "--pairs", 20, cwd=tmp_path)
