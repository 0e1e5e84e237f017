"""Objects that no reference names, on captions made by hand."""

import json

import numpy as np
import pytest

from tests.conftest import REPO
from training.lib.metrics import chair_of_statistics, hallucination_statistics, paired_bootstrap
from training.lib.metrics.hallucination import hallucinated_objects, named_objects, object_names


@pytest.mark.parametrize(
    "caption, objects",
    [
        ("Two dogs run on the grass.", {"dog", "grass"}),
        ("A puppy's ball lies near some women", {"dog", "ball", "woman"}),
        ("a man eats a hot dog by a fire hydrant", {"man", "hot dog", "fire hydrant"}),  # no dog, no fire
        ("a teddy bear on the train tracks", {"teddy bear", "track"}),  # no bear, no train
        ("a batter at home plate", {"person"}),  # no house, no plate
        ("a couple of cows", {"cow"}),  # no people
        ("a baby elephant and a baby", {"elephant", "baby"}),
        ("a skier in a t-shirt", {"person", "skis", "shirt"}),
        ("knives, berries and benches", {"knife", "strawberry", "bench"}),
        ("an orange stop sign", {"stop sign"}),  # the colour is no fruit
        ("glasses of wine beside glasses", {"drinking glass", "wine", "glasses"}),
        ("something is happening here", set()),
        ("", set()),
    ],
)
def test_names_in_captions(caption, objects):
    assert named_objects(caption) == objects


@pytest.mark.parametrize(
    "caption, reference, wrong",
    [
        ("a person", "a woman", set()),  # what a woman is
        ("a woman", "a person", {"woman"}),  # more than the reference says
        ("a man", "a woman", {"man"}),
        ("an animal on sand", "a puppy on the beach", set()),
        ("a vehicle", "a taxi", set()),  # over two steps: taxi, car, vehicle
        ("a sofa", "two couches", set()),
        ("a dog with a frisbee and a frisbee", "a dog", {"frisbee"}),
    ],
)
def test_what_references_make_right(caption, reference, wrong):
    assert hallucinated_objects(caption, ["nothing of note", reference]) == wrong


def test_any_reference_is_enough():
    assert hallucinated_objects("a dog in snow", ["a dog", "snow falls"]) == set()


def test_shares_by_hand():
    captions = ["a dog and a cat on grass", "a man on a horse", "nothing of note", "a boat"]
    references = [["a dog on grass"], ["a man rides a horse"], ["a dog"], ["a car", "a tree"]]
    statistics = hallucination_statistics(captions, references)
    assert statistics.tolist() == [[3, 1, 1], [2, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert chair_of_statistics(statistics.mean(0)).tolist() == pytest.approx([2 / 6, 2 / 4])
    assert chair_of_statistics(np.zeros((5, 3))).tolist() == [[0, 0]] * 5  # no object: no share, and no warning
    with pytest.raises(ValueError, match="4 captions for 3 images"):
        hallucination_statistics(captions, references[:3])


def test_interval_of_a_difference():
    """Of 101 images, one system is wrong in 40 and the other in 10: CHAIR_s and CHAIR_i differ by 30 of 101 images."""
    right, wrong = [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    ours, baseline = (np.array([wrong] * n + [right] * (101 - n)) for n in (10, 40))
    for share in (0, 1):
        result = paired_bootstrap(ours, baseline, lambda mean, share=share: chair_of_statistics(mean)[..., share])
        assert result["difference"] == pytest.approx(-30 / 101)
        assert -0.40 < result["low"] < -0.35 and -0.24 < result["high"] < -0.19


def test_people_name_what_is_there():
    """A person's caption against the other four of its image, and against those of the next image."""
    captions = json.loads((REPO / "tests" / "captions.json").read_text())
    said, references = [entry[0] for entry in captions], [entry[1:] for entry in captions]
    own = chair_of_statistics(hallucination_statistics(said, references).mean(0))
    other = chair_of_statistics(hallucination_statistics(said, references[1:] + references[:1]).mean(0))
    assert 0.05 < own[0] < 0.25 and other[0] > 0.7 and own[1] < 0.45 < 0.9 < other[1]


def test_the_table_of_objects():
    names, implied = object_names()
    assert len(implied) > 300 and max(map(len, names)) == 3
    coco = "person bicycle car motorcycle airplane bus train truck boat bench bird cat dog horse sheep cow elephant bear zebra"
    coco += " giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard kite skateboard surfboard bottle cup fork"
    coco += " knife spoon bowl banana apple sandwich broccoli carrot pizza donut cake chair couch bed toilet tv laptop mouse"
    coco += " remote keyboard microwave oven toaster sink refrigerator book clock vase scissors toothbrush"
    assert not set(coco.split()) - set(implied)
    for name in ("mountain", "beach", "hat", "shirt", "helmet", "fence", "ball", "tower", "bridge"):
        assert named_objects(f"two {name} here") == {name}
    everyday = {"potted plant": "plant", "cell phone": "phone", "hair drier": "hair dryer", "dining table": "table"}
    for said, name in everyday.items():
        assert named_objects(said) == {name}
