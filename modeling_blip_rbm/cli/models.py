"""Loading a model for a command, so that whatever is wrong with it is one line."""

from pathlib import Path

from transformers import AutoConfig

from modeling_blip_rbm import (
    BlipRBMForConditionalGeneration,
    BlipRBMForImageTextRetrieval,
    BlipRBMImageToTextPipeline,
    BlipRBMProcessor,
)
from modeling_blip_rbm.cli.arguments import chosen_device


def load(name: str | None, dtype: str = "auto", retrieval: bool = False):
    """The model and its processor, on the CPU.

    Args:
        retrieval: its retrieval head, if its RBM has words, in the place of the captioner.

    Raises:
        ValueError: in one sentence, whatever is wrong with the model.
    """
    if name is None:
        raise ValueError(
            "no model: this installation has none beside it. Give --model, a folder or a Hub id, or set BLIP_RBM_MODEL"
        )
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise ValueError(f"{name}: no such folder, and no Hub id, which would be of the form user/name")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ("blip_rbm", "blip"):
            raise ValueError(f"it is a {config.model_type}, not a BLIP-RBM")
        words = bool(getattr(config, "rbm_word_ids", None))
        kind = BlipRBMForImageTextRetrieval if retrieval and words else BlipRBMForConditionalGeneration
        model = kind.from_pretrained(name, dtype=dtype)
        processor = BlipRBMProcessor.from_pretrained(name)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{name}: cannot be loaded as a BLIP-RBM ({type(error).__name__}: {error})") from error
    return model.eval(), processor


def load_captioner(args) -> BlipRBMImageToTextPipeline:
    """The pipeline of the model that --model, --device, --dtype and --int8 mean.

    Raises:
        ValueError: in one sentence, whatever is wrong with them.
    """
    device = chosen_device(args.device)
    model, processor = load(args.model, args.dtype)
    model.to(device).optimize_for_inference(int8=args.int8)
    return BlipRBMImageToTextPipeline(model=model, processor=processor, device=device)
