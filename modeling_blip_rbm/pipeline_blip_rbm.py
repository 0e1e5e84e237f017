"""`pipeline("image-to-text")`, the task that transformers 5 removed: images in; caption, score and words out. Its replacement,
`pipeline("image-text-to-text")`, does the same for this model."""

import importlib
from collections.abc import Mapping
from typing import Optional

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .processing_blip_rbm import NO_CHAT, BlipRBMProcessor


def _files_needed():  # never called: transformers 4.57 copies from a folder what a file imports, not what that imports in turn
    from .configuration_blip_rbm import BlipRBMConfig  # noqa: F401
    from .rbm import JointRBM  # noqa: F401


class BlipRBMImageToTextPipeline(Pipeline):
    """Captions images.

    Example:

    ```python
    captioner = pipeline("image-to-text", model="org/blip-rbm", trust_remote_code=True)
    captioner("photo.jpg")
    # [{"generated_text": "a dog runs on the beach", "score": 0.41, "words": {"dog": 0.93, "beach": 0.61, ...}}]
    ```

    Takes what [`load_image`] reads, or a list, dataset column or generator of it; with a text of its own for an image, {"images": image, "text":
    text}. With `batch_size` and `num_workers=1` the next files of a list are decoded while the model has a batch. `dataset.map(captioner,
    batched=True)` adds the columns generated_text, score and confidence. For every image it returns a list of `num_return_sequences` dicts:

    - `generated_text`: the caption.
    - `score`: the geometric mean of the decoder's probability of its tokens, in [0, 1].
    - `confidence`: the chance that the caption is right, if the model was calibrated (`training/evaluate_confidence.py`).
    - `words`: the RBM's most probable words for the image, each with P(word | image, no other word); `top_words` many.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, processor=None, image_processor=None, tokenizer=None, **kwargs):
        if (
            processor is None and image_processor is not None and tokenizer is not None
        ):  # as transformers 4.57 was given them
            processor = BlipRBMProcessor(image_processor, tokenizer)
        if processor is None:
            raise ValueError("no processor: give processor=BlipRBMProcessor.from_pretrained(...) along with the model")
        super().__init__(*args, processor=processor, **kwargs)

    def _sanitize_parameters(
        self,
        prompt=None,
        text=None,
        top_words=None,
        timeout=None,
        generate_kwargs=None,
        return_full_text=None,
        **kwargs,
    ):
        if prompt is not None and text is not None:
            raise ValueError(f"prompt is {prompt!r} and text {text!r}, which are two names for how the caption begins")
        prompt = text if prompt is None else prompt
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"the prompt is {prompt!r}, but must be one text: how every caption begins")
        twice = sorted(set(generate_kwargs or {}) & set(kwargs))
        if twice:
            raise ValueError(f"{', '.join(twice)} stands both in generate_kwargs and beside it: give it once")
        # encoded once for all images, which is also when unknown words are warned of
        encoded = {} if prompt is None else {"prompt": self.processor.encode_text([prompt], as_prompt=True)}
        preprocess = encoded | ({} if timeout is None else {"timeout": timeout})
        forward = ({} if top_words is None else {"top_words": top_words}) | (generate_kwargs or {}) | kwargs
        return preprocess, forward, {"prompt": prompt} if prompt and return_full_text is False else {}

    def __call__(self, inputs=None, images=None, text=None, **kwargs):
        """See the class. Other arguments go to `generate`.

        Args:
            inputs: the image or images; `images` is another name.
            prompt: how every caption begins; `text` is another name, and may be a list with a text for each image of a list.
            timeout: seconds to wait for an image from the network (default: 30).
            return_full_text: False: captions without the prompt.

        Raises:
            ValueError: for an empty list, what cannot be read as an image, or a conversation.
        """
        if (inputs is None) == (images is None):
            raise ValueError("give the image or a list of images, once: captioner('photo.jpg')")
        inputs = images if inputs is None else inputs
        if isinstance(inputs, Mapping) and isinstance(inputs.get("image"), list):
            return self._columns(inputs["image"], text=text, **kwargs)
        if isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                raise ValueError("the list of images is empty: give at least one image")
        if _is_chat(inputs) or _is_chat(text):
            raise ValueError(NO_CHAT)
        if isinstance(text, (list, tuple)):
            several = inputs if isinstance(inputs, list) else [inputs]
            if len(several) != len(text):
                raise ValueError(
                    f"there are {len(several)} images and {len(text)} texts: give one text for each, or one for all"
                )
            inputs, text = [{"images": image, "text": one} for image, one in zip(several, text)], None
        kwargs |= {} if text is None else {"text": text}
        if type(inputs).__module__.startswith("datasets."):  # an image at a time, not all at once
            rows = (row["image"] if isinstance(row, dict) and "image" in row else row for row in inputs)
            return list(super().__call__(rows, **kwargs))
        return super().__call__(inputs, **kwargs)

    def _columns(self, images: list, **kwargs) -> dict[str, list]:
        """What `dataset.map(captioner, batched=True)` takes: a value an image, or a list of them if there are several captions."""
        results = self(images, **{"batch_size": len(images)} | kwargs)
        names = [name for name in ("generated_text", "score", "confidence") if name in results[0][0]]
        values = {name: [[caption[name] for caption in captions] for captions in results] for name in names}
        single = all(len(captions) == 1 for captions in results)
        return {name: [one[0] for one in of_images] if single else of_images for name, of_images in values.items()}

    def preprocess(self, image, prompt: Optional[Mapping] = None, timeout: Optional[float] = 30.0):
        """One image, or what this returned for one before, as tensors; `prompt` as `encode_text` gives it."""
        if isinstance(image, Mapping) and "pixel_values" in image:
            return dict(image) | dict(prompt or {})
        if isinstance(image, Mapping) and ("images" in image or "image" in image):
            text = image.get("text")
            prompt = prompt if text is None else self.processor.encode_text([text], as_prompt=True)
            image = image.get("images", image.get("image"))
        pixel_values = self.processor(images=image, timeout=timeout)["pixel_values"]
        return {"pixel_values": pixel_values} | dict(prompt or {})

    def _forward(self, inputs, top_words: int = 5, **generate_kwargs):
        model = self.model
        encoding = model.encode_for_generation(inputs["pixel_values"], rbm=generate_kwargs.get("rbm", True))
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        sequences = model.generate(encoding=encoding, **prompt, **generate_kwargs)
        if not hasattr(sequences, "shape"):  # return_dict_in_generate=True in the generation config
            sequences = sequences.sequences
        evidence = model.caption_evidence(encoding, sequences)
        output = {"sequences": sequences, "score": evidence[:, 0].exp()}
        if model.config.rbm_confidence is not None:
            output["confidence"] = model.confidence(evidence)
        if model.config.rbm_word_ids and top_words:
            output["word_probs"], output["word_ids"] = model.image_words(encoding.hidden_input, top_words)
        images = len(encoding.image_embeds)  # one row an image: the base class takes a batch apart along the first axis
        return {name: value.reshape(images, -1) for name, value in output.items()}

    def postprocess(self, outputs, prompt: str = ""):
        words = {}
        if "word_ids" in outputs:
            tokens = self.processor.tokenizer.convert_ids_to_tokens(outputs["word_ids"].flatten().tolist())
            words = dict(zip(tokens, outputs["word_probs"].flatten().tolist()))
        sequences, scores = outputs["sequences"], outputs["score"].flatten().tolist()
        captions = self.processor.captions(sequences.reshape(len(scores), -1))
        if prompt:  # as the tokenizer writes it
            begin = self.processor.captions(self.processor.encode_text([prompt], as_prompt=True)["input_ids"])[0]
            captions = [caption.removeprefix(begin).strip() for caption in captions]
        results = [
            {"generated_text": caption, "score": score, "words": words} for caption, score in zip(captions, scores)
        ]
        if "confidence" in outputs:
            for result, confidence in zip(results, outputs["confidence"].flatten().tolist()):
                result["confidence"] = confidence
        return results


def _is_chat(inputs) -> bool:
    first = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    return isinstance(first, Mapping) and "role" in first


def _take_over(task: str):
    """Make `pipeline(task, model=model)` build the pipeline of this file for a BLIP-RBM and what it did before for every other model.

    transformers looks for a pipeline of a model's own only if the model is given by name, and has replaced image-to-text by image-text-to-text,
    which wants a text."""
    entry = PIPELINE_REGISTRY.supported_tasks.get(task)
    if entry is None or getattr(entry["impl"], "is_of_blip_rbm", False):
        return
    stock = entry["impl"]
    if isinstance(stock, str):  # transformers 5 imports a pipeline where it is asked for
        module, name = stock.rsplit(".", 1)
        stock = getattr(importlib.import_module(module), name)

    class OfThisModel(stock):
        is_of_blip_rbm = True
        # None: load it if it can be
        _load_processor = stock._load_processor or None
        _load_tokenizer = stock._load_tokenizer and None
        _load_image_processor = stock._load_image_processor and None

        def __new__(cls, *args, model=None, **kwargs):
            own = getattr(getattr(model, "config", None), "model_type", None) == "blip_rbm"
            return (BlipRBMImageToTextPipeline if own else stock)(*args, model=model, **kwargs)

    OfThisModel.__name__ = OfThisModel.__qualname__ = stock.__name__
    entry["impl"] = OfThisModel


for _task in ("image-to-text", "image-text-to-text"):
    _take_over(_task)

__all__ = ["BlipRBMImageToTextPipeline"]
