"""COCO caption tokenization without Java: Stanford's PTB tokens, lower-cased, COCO's punctuation dropped.

Identical to pycocoevalcap's PTBTokenizer on all 5,000 captions of Flickr8k's validation split. Known differences, rare
in captions: the jar keeps `and/or` and `1/2` whole, and splits `gonna`.
"""

import re


# pycocoevalcap/tokenizer/ptbtokenizer.py: PUNCTUATIONS
PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# The jar writes brackets so, in lower case: COCO's list, in capitals, therefore lets them stand.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # u.s.
    r"|n't\b|'(?:s|m|d|re|ve|ll)\b"  # contractions, split off by the rule below
    r"|\d+(?:[.,:]\d+)*(?:st|nd|rd|th|s)?(?:-\w+)*"  # 1,000  10:30  2nd  90s  4-wheeler
    r"|\w+?(?=n't\b)"  # do|n't
    r"|[\w&]+(?:-\w+)*"  # words, t-shirt
    r"|\.{3,}|--+|``|''|[^\w\s]"
)


def tokenize(caption: str) -> list[str]:
    """Tokens of a caption, as COCO's evaluation counts them."""
    tokens = _TOKEN.findall(caption.lower().replace('"', " "))
    return [BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION]
