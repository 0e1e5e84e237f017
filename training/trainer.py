"""Moved: `from training.lib.trainer import CaptionCollator, CaptionSeq2SeqTrainer, caption_metrics`."""

import warnings

from training.lib.trainer import CaptionCollator, CaptionSeq2SeqTrainer, caption_metrics


warnings.warn("training.trainer is training.lib.trainer now", DeprecationWarning, stacklevel=2)

__all__ = ["CaptionCollator", "CaptionSeq2SeqTrainer", "caption_metrics"]
