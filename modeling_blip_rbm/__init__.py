"""BLIP with a restricted Boltzmann machine between its vision encoder and its text decoder."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_blip_rbm import BlipRBMConfig
from .modeling_blip_rbm import BlipRBMForConditionalGeneration
from .pipeline_blip_rbm import BlipRBMImageToTextPipeline
from .processing_blip_rbm import BlipRBMProcessor, load_image
from .rbm import JointRBM, RBMParameters, contrastive_divergence, energy, free_energy, gibbs
from .rbm_estimator import RBM, DeepBeliefNetwork
from .rbm_likelihood import annealed_importance_sampling, log_partition_function, log_prob
from .retrieval_blip_rbm import BlipRBMForImageTextRetrieval


__version__ = "0.1.0"

AutoConfig.register("blip_rbm", BlipRBMConfig, exist_ok=True)
AutoModel.register(BlipRBMConfig, BlipRBMForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(BlipRBMConfig, BlipRBMForConditionalGeneration, exist_ok=True)
AutoModelForZeroShotImageClassification.register(BlipRBMConfig, BlipRBMForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(BlipRBMConfig, BlipRBMProcessor, exist_ok=True)

__all__ = [
    "RBM",
    "BlipRBMConfig",
    "BlipRBMForConditionalGeneration",
    "BlipRBMForImageTextRetrieval",
    "BlipRBMImageToTextPipeline",
    "BlipRBMProcessor",
    "DeepBeliefNetwork",
    "JointRBM",
    "RBMParameters",
    "annealed_importance_sampling",
    "contrastive_divergence",
    "energy",
    "free_energy",
    "gibbs",
    "load_image",
    "log_partition_function",
    "log_prob",
]
