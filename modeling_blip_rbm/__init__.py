"""BLIP with a restricted Boltzmann machine between its vision encoder and its text decoder."""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_blip_rbm import BlipRBMConfig, DecodingSettings
from .modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMForImageTextRetrieval
from .pipeline_blip_rbm import BlipRBMImageToTextPipeline
from .processing_blip_rbm import BlipRBMProcessor, load_image
from .rbm import JointRBM, RBMParameters, contrastive_divergence, energy, free_energy, gibbs


__version__ = "0.1.0"

MOVED_TO_BOLTZMANN = (
    "RBM",
    "DeepBeliefNetwork",
    "annealed_importance_sampling",
    "log_partition_function",
    "log_prob",
)

AutoConfig.register("blip_rbm", BlipRBMConfig, exist_ok=True)
AutoModel.register(BlipRBMConfig, BlipRBMForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(BlipRBMConfig, BlipRBMForConditionalGeneration, exist_ok=True)
if hasattr(transformers, "AutoModelForMultimodalLM"):  # transformers 5
    transformers.AutoModelForMultimodalLM.register(BlipRBMConfig, BlipRBMForConditionalGeneration, exist_ok=True)
AutoModelForZeroShotImageClassification.register(BlipRBMConfig, BlipRBMForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(BlipRBMConfig, BlipRBMProcessor, exist_ok=True)

__all__ = [
    "BlipRBMConfig",
    "BlipRBMForConditionalGeneration",
    "BlipRBMForImageTextRetrieval",
    "BlipRBMImageToTextPipeline",
    "BlipRBMProcessor",
    "DecodingSettings",
    "JointRBM",
    "RBMParameters",
    "contrastive_divergence",
    "energy",
    "free_energy",
    "gibbs",
    "load_image",
]


def __getattr__(name: str):  # where the RBM for any data matrix was until it became a package of its own
    if name not in MOVED_TO_BOLTZMANN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    import boltzmann

    warnings.warn(f"{name} is in boltzmann: `from boltzmann import {name}`", DeprecationWarning, stacklevel=2)
    return getattr(boltzmann, name)
