"""Metrics as modules of Hugging Face's `evaluate`, see `training/metrics/`."""

from collections.abc import Callable

import datasets
import evaluate


def evaluate_metric(score: Callable[..., dict], references: bool = True) -> type[evaluate.Metric]:
    """A class that `evaluate.load` finds in a module.

    Args:
        score: from captions and, with `references`, of each image a list of captions, to numbers by name. Further
            arguments are those of `compute`. Its docstring describes the metric.
    """
    features = {"predictions": datasets.Value("string")}
    if references:
        features["references"] = datasets.Sequence(datasets.Value("string"))

    class CaptionMetric(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=score.__doc__,
                citation="",
                inputs_description="predictions: captions, one an image; references: of each image, a list of captions",
                features=datasets.Features(features),
            )

        def _compute(self, predictions, **inputs):
            return score(predictions, **inputs)

    return CaptionMetric
