"""Objects that a caption names and no reference does: CHAIR (Rohrbach et al., EMNLP 2018), without annotated objects.

CHAIR knows which objects an image shows from annotations and references; here the references alone tell. A thing that is
there and that nobody mentions counts as hallucinated too: compare systems on the same images, and read no number alone.

`objects.tsv` holds an object a line: `name <TAB> what it implies <TAB> other names`, with commas between. COCO's 80
categories with CHAIR's synonyms, and everyday things of other captions. The implied objects are named as well: a reference
`dog` makes the caption `animal` right, and not the other way. The line without an object holds phrases that look like one
(`home plate`). Regular plurals are added.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np

from training.lib.metrics.tokenizer import tokenize


QUALIFIERS = {"baby", "adult", "male", "female", "mother"}  # no person before an animal: a baby elephant


def plural(name: str) -> str:
    """The regular plural of a name's last word."""
    if re.search("(s|x|z|ch|sh)$", name):
        return name + "es"
    return name[:-1] + "ies" if re.search("[^aeiou]y$", name) else name + "s"


@cache
def object_names() -> tuple[dict[tuple[str, ...], frozenset[str]], dict[str, frozenset[str]]]:
    """Of each name, as words, the objects that it names; of each object, itself and all that it implies."""
    names, parents = {}, {}
    for line in Path(__file__).with_name("objects.tsv").read_text(encoding="utf-8").splitlines():
        name, implied, others = line.split("\t")
        objects = frozenset([name] if name else [])
        if name:
            parents[name] = frozenset(filter(None, implied.split(", ")))
        listed = [name, *others.split(", ")]
        for said in (*listed, *(plural(said) for said in listed if name and said)):
            words = tuple(said.split())
            names[words] = names.get(words, frozenset()) | objects
    del names[()]

    def closure(name):
        return frozenset([name]).union(*map(closure, parents[name]))

    return names, {name: closure(name) for name in parents}


def named_objects(caption: str) -> set[str]:
    """Objects that a caption names, each by its first name in the table. Of overlapping names the longest counts."""
    names, implied = object_names()
    longest = max(map(len, names))
    tokens, start, matches = tokenize(caption), 0, []
    while start < len(tokens):
        ends = range(min(start + longest, len(tokens)), start, -1)
        end = next((end for end in ends if tuple(tokens[start:end]) in names), None)
        if end is not None:
            matches.append((start, end, names[tuple(tokens[start:end])]))
        start = end or start + 1
    found = set()
    for (start, end, objects), (after, _, next_objects) in zip(matches, [*matches[1:], (None, None, ())]):
        of_animal = end == after and any("animal" in implied[name] for name in next_objects)
        if not (of_animal and tokens[start] in QUALIFIERS):
            found |= objects
    return found


def hallucinated_objects(caption: str, references: list[str]) -> set[str]:
    """Objects that a caption names and that no reference names or implies."""
    implied = object_names()[1]
    known = set().union(*(implied[name] for reference in references for name in named_objects(reference)))
    return named_objects(caption) - known


def hallucination_statistics(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """(n, 3) of each caption: objects named, objects hallucinated, 1 if there is one hallucinated. They add up.

    Raises:
        ValueError: if there are not as many captions as images.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} images")
    rows = []
    for caption, of_image in zip(captions, references):
        wrong = len(hallucinated_objects(caption, of_image))
        rows.append([len(named_objects(caption)), wrong, wrong > 0])
    return np.array(rows, dtype=float).reshape(-1, 3)


def chair_of_statistics(mean: np.ndarray) -> np.ndarray:
    """(..., 3) statistics, the mean over images -> (..., 2) CHAIR_i, the share of named objects that are hallucinated, and
    CHAIR_s, the share of captions with such an object; both in [0, 1]."""
    named, hallucinated, captions = np.moveaxis(mean, -1, 0)
    return np.stack([hallucinated / np.where(named > 0, named, 1.0), captions], axis=-1)
