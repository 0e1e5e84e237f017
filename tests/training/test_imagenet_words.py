"""The table of ImageNet's classes and the words that people use for them."""

from tests.conftest import REPO


ROWS = [line.split("\t") for line in (REPO / "training" / "imagenet_words.tsv").read_text().splitlines()]


def test_every_class_has_a_row_in_its_place():
    assert [row[0] for row in ROWS] == [str(index) for index in range(1000)]
    assert all(len(row) == 3 and row[1] for row in ROWS)


def test_words_are_single_words_in_lower_case():
    words = [row[2] for row in ROWS]
    assert all(word == "" or (word.isalpha() and word.islower()) for word in words)
    assert words.count("") <= 30 and len(set(words)) > 400 and words.count("dog") > 110


def test_words_are_those_of_captions():
    word = {int(index): (label, said) for index, label, said in ROWS}
    assert word[281] == ("tabby", "cat") and word[285] == ("Egyptian cat", "cat")
    assert word[207] == ("golden retriever", "dog") and word[350] == ("ibex", "goat")
    assert word[967] == ("espresso", "coffee") and word[468] == ("cab", "taxi")
    assert word[948] == ("Granny Smith", "apple") and word[698] == ("palace", "palace")
    assert word[681] == ("notebook", "laptop")  # the computer, not the paper
