"""`pipeline("image-to-text")`, the task that transformers 5 removed: images in; caption, score and words out."""

from typing import Optional

from transformers import Pipeline

from .processing_blip_rbm import load_image


class BlipRBMImageToTextPipeline(Pipeline):
    """Captions images.

    Example:

    ```python
    captioner = pipeline("image-to-text", model="org/blip-rbm", trust_remote_code=True)
    captioner("photo.jpg")
    # [{"generated_text": "a dog runs on the beach", "score": 0.41, "words": {"dog": 0.93, "beach": 0.61, ...}}]
    ```

    Takes a path, URL, PIL image, array, or a list, dataset column or generator of them. With `batch_size` and
    `num_workers=1` the next files of a list are decoded while the model has a batch. For every image it returns a list of
    `num_return_sequences` dicts:

    - `generated_text`: the caption.
    - `score`: the geometric mean of the decoder's probability of its tokens, in [0, 1].
    - `confidence`: the chance that the caption is right, if the model was calibrated (`training/evaluate_confidence.py`).
    - `words`: the RBM's most probable words for the image, each with P(word | image, no other word); `top_words` many.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self, prompt: Optional[str] = None, top_words: Optional[int] = None, generate_kwargs=None, **kwargs
    ):
        preprocess = {} if prompt is None else {"prompt": prompt}
        forward = {} if top_words is None else {"top_words": top_words}
        return preprocess, {**forward, **(generate_kwargs or {}), **kwargs}, {}

    def __call__(self, inputs, **kwargs):
        """See the class. `prompt`: how every caption begins. Other arguments go to `generate`.

        Raises:
            ValueError: for an empty list, or what cannot be read as an image.
        """
        if isinstance(inputs, (list, tuple)) and not inputs:
            raise ValueError("the list of images is empty: give at least one image")
        if type(inputs).__module__.startswith(
            "datasets."
        ):  # a column or a dataset: an image at a time, not all at once
            rows = (row["image"] if isinstance(row, dict) and "image" in row else row for row in inputs)
            return list(super().__call__(rows, **kwargs))
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image, prompt: Optional[str] = None):
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            from transformers.image_utils import load_image as fetch_image

            image = fetch_image(image)
        return self.processor(images=load_image(image), text=prompt)

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

    def postprocess(self, outputs):
        words = {}
        if "word_ids" in outputs:
            tokens = self.processor.tokenizer.convert_ids_to_tokens(outputs["word_ids"].flatten().tolist())
            words = dict(zip(tokens, outputs["word_probs"].flatten().tolist()))
        sequences, scores = outputs["sequences"], outputs["score"].flatten().tolist()
        captions = self.processor.captions(sequences.reshape(len(scores), -1))
        results = [
            {"generated_text": caption, "score": score, "words": words} for caption, score in zip(captions, scores)
        ]
        if "confidence" in outputs:
            for result, confidence in zip(results, outputs["confidence"].flatten().tolist()):
                result["confidence"] = confidence
        return results


__all__ = ["BlipRBMImageToTextPipeline"]
