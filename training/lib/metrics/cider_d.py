"""CIDEr-D of captions (Vedantam et al., CVPR 2015): what COCO reports as "CIDEr".

idf comes from the references of the images evaluated, so scores of different image sets are not comparable: for a
subset, keep the `CiderD` of the full set.
"""

from collections import Counter

import numpy as np

from training.lib.metrics.bleu import N, ngram_counts
from training.lib.metrics.tokenizer import tokenize


SIGMA = 6.0


class CiderD:
    """Scores captions against references, with the references' document frequencies.

    Args:
        references: of every image, a list of captions.
    """

    def __init__(self, references: list[list[str]]):
        counts = [[ngram_counts(tokenize(reference)) for reference in of_image] for of_image in references]
        self.document_frequency = Counter(ngram for of_image in counts for ngram in set().union(*of_image))
        self.log_images = np.log(float(len(references)))
        self.references = [[self._vectors(reference) for reference in of_image] for of_image in counts]

    def _vectors(self, counts: Counter):
        vectors = [{} for _ in range(N)]
        for ngram, count in counts.items():
            idf = self.log_images - np.log(max(1.0, self.document_frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        norms = [np.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)  # COCO's length: its bigrams
        return vectors, norms, length

    def score(self, image: int, candidate: str) -> float:
        """CIDEr-D of one caption against the references of image number `image`; about 0 to 10."""
        vectors, norms, length = self._vectors(ngram_counts(tokenize(candidate)))
        total = 0.0
        for ref_vectors, ref_norms, ref_length in self.references[image]:
            penalty = np.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for vector, norm, ref_vector, ref_norm in zip(vectors, norms, ref_vectors, ref_norms):
                overlap = sum(
                    min(value, ref_vector[g]) * ref_vector[g] for g, value in vector.items() if g in ref_vector
                )
                if norm and ref_norm:
                    overlap /= norm * ref_norm
                total += overlap * penalty
        return 10.0 * total / N / len(self.references[image])

    def scores(self, candidates: list[str]) -> np.ndarray:
        """(images,) CIDEr-D of one caption an image. The corpus score is their mean."""
        if len(candidates) != len(self.references):
            raise ValueError(f"{len(candidates)} captions for {len(self.references)} images")
        return np.array([self.score(image, candidate) for image, candidate in enumerate(candidates)])
