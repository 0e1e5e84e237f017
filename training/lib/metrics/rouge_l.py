"""ROUGE-L of captions (Lin, ACL 2004), as COCO computes it: beta 1.2, best precision and best recall over
references."""

from training.lib.metrics.tokenizer import tokenize


BETA = 1.2


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidate: str, references: list[str]) -> float:
    """F-score in [0, 1] of one caption."""
    tokens = tokenize(candidate) or [""]  # an empty caption counts as one empty token, as in pycocoevalcap
    pairs = [(longest_common_subsequence(reference, tokens), reference) for reference in map(tokenize, references)]
    precision = max(lcs / len(tokens) for lcs, _ in pairs)
    recall = max(lcs / max(1, len(reference)) for lcs, reference in pairs)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
