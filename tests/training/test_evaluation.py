"""The numbers of an evaluation, on captions made by hand."""

import numpy as np
import pytest

from training.evaluate_captions import differences, per_image, summary


REFERENCES = [["a dog runs on grass", "a dog in a field"], ["two men ride horses"], ["a red car on a road"]]
WRONG = ["a cat runs on grass", "two men ride horses", "a car"]
RIGHT = ["a dog runs on grass", "two men ride horses", "a car"]


def test_numbers_of_a_system():
    numbers = summary(WRONG, per_image(WRONG, REFERENCES), ["a car"])
    assert numbers["CHAIR-i"] == pytest.approx(100 / 5) and numbers["CHAIR-s"] == pytest.approx(100 / 3)
    assert numbers["novel"] == pytest.approx(2 / 3) and numbers["vocabulary"] == 10
    assert numbers["BLEU-1"] < summary(RIGHT, per_image(RIGHT, REFERENCES), None)["BLEU-1"]


def test_differences_of_two_systems():
    right, wrong = per_image(RIGHT, REFERENCES), per_image(WRONG, REFERENCES)
    measured = differences(right, wrong)
    assert set(measured) == {"CIDEr-D", "BLEU-4", "ROUGE-L", "CHAIR-i", "CHAIR-s"}
    assert measured["CHAIR-i"]["difference"] == pytest.approx(-20)
    assert measured["CHAIR-s"]["low"] < measured["CHAIR-s"]["difference"] < 0 == measured["CHAIR-s"]["high"]
    scored = differences(right | {"meteor": np.array([0.7, 1, 0.4])}, wrong | {"meteor": np.array([0.4, 1, 0.4])})
    assert scored["METEOR"]["difference"] == pytest.approx(10)
