"""Images and texts compared by the RBM's energy: BLIP's ITC and ITM without a text encoder, on the same checkpoint as the captioner.

Axes: B images, M texts, T tokens, H hidden causes, K words of the RBM.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.utils import ModelOutput

from .configuration_blip_rbm import BlipRBMConfig
from .decoding_blip_rbm import word_columns, words_said
from .modeling_blip_rbm import RBMLayer, image_tokens, new_vision_tower, pool_tokens
from .rbm import JointRBM, pairwise_mutual_information


@dataclass
class BlipRBMRetrievalOutput(ModelOutput):
    """How well each image and each text go together."""

    logits_per_image: Optional[torch.FloatTensor] = None  # (B, M) PMI of image and words, nats
    logits_per_text: Optional[torch.FloatTensor] = None  # (M, B) the same
    match_probability: Optional[torch.FloatTensor] = None  # (B, M) chance that the text was written for the image
    image_free_energy: Optional[torch.FloatTensor] = None  # (B,) F(x), high for images unlike the training images


class BlipRBMForImageTextRetrieval(BlipPreTrainedModel):
    """Image-text retrieval and matching by the RBM of a BLIP-RBM.

    The similarity (BLIP's ITC) is the pointwise mutual information of image and words under the RBM: a difference of free energies, of
    the image and the text's words. The matching head (BLIP's ITM) is a logistic function of it, fitted against hard negatives, the texts
    of other images that the energy likes best (`training/capfilt.py`): `config.rbm_match`.

    ```python
    model = AutoModelForZeroShotImageClassification.from_pretrained("org/blip-rbm", trust_remote_code=True)
    inputs = processor(images=photos) | processor(text=["a dog on the beach", "two men on bikes"])
    model(**inputs).logits_per_image
    ```
    """

    config_class = BlipRBMConfig
    main_input_name = "pixel_values"
    _keep_in_fp32_modules = ["rbm_layer"]
    _keys_to_ignore_on_load_unexpected = [r"^text_decoder\.", r"^projector\."]  # the captioner's

    def __init__(self, config):
        super().__init__(config)
        if not config.rbm_word_ids:
            raise ValueError(
                "texts are compared by the RBM's words, but config.rbm_word_ids is empty: train it with words"
            )
        self.vision_model = new_vision_tower(config)
        config.set_visible_size()
        self.rbm_layer = RBMLayer(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, JointRBM):
            module.reset_parameters()
        elif isinstance(module, RBMLayer):
            nn.init.zeros_(module.gate)
        else:
            super()._init_weights(module)

    def get_image_features(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """a (B, H): the hidden input from images (B, 3, S, S), or from the tower's output (B, N, C)."""
        return self.rbm_layer.hidden_input(self._tokens(pixel_values, vision_hidden_states))

    def get_text_features(self, input_ids, attention_mask=None) -> torch.Tensor:
        """w (M, K) in {0, 1}: which of the RBM's words stand in the texts (M, T)."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.text_config.pad_token_id)
        word_ids = self.config.rbm_word_ids
        columns = word_columns(word_ids, self.config.text_config.vocab_size, input_ids.device)
        return words_said(input_ids, columns, len(word_ids))

    def match_probability(self, pmi: torch.Tensor) -> torch.Tensor:
        """Chance that a text was written for an image and not for another one like it, of their PMI.

        Raises:
            ValueError: if the head was never fitted.
        """
        if self.config.rbm_match is None:
            raise ValueError("config.rbm_match is None: fit the matching head with training/capfilt.py")
        bias, weight = self.config.rbm_match
        return torch.sigmoid(bias + weight * pmi)

    def forward(
        self, pixel_values=None, input_ids=None, attention_mask=None, vision_hidden_states=None, return_dict=None
    ) -> BlipRBMRetrievalOutput:
        """
        Args:
            pixel_values (B, 3, S, S) or vision_hidden_states (B, N, C). input_ids, attention_mask (M, T): of texts, as the processor
                makes them.
        """
        tokens = self._tokens(pixel_values, vision_hidden_states)
        rbm = self.rbm_layer.rbm
        x = rbm.standardise(pool_tokens(tokens, self.config.rbm_pooling))
        pmi = pairwise_mutual_information(
            rbm.parameters_fp32, rbm.hidden_input(x), self.get_text_features(input_ids, attention_mask)
        )
        output = BlipRBMRetrievalOutput(
            logits_per_image=pmi,
            logits_per_text=pmi.T,
            match_probability=None if self.config.rbm_match is None else self.match_probability(pmi),
            image_free_energy=rbm.free_energy(x),
        )
        return output.to_tuple() if return_dict is False else output

    def _tokens(self, pixel_values, vision_hidden_states):
        if (pixel_values is None) == (vision_hidden_states is None):
            raise ValueError("give either pixel_values or vision_hidden_states (the tower's output)")
        if vision_hidden_states is None:
            vision_hidden_states = image_tokens(self.vision_model, pixel_values.to(self.dtype))
        return vision_hidden_states


BlipRBMForImageTextRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["BlipRBMForImageTextRetrieval", "BlipRBMRetrievalOutput"]
