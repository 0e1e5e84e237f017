"""For those who fine-tune with the HF Trainer themselves: batches, evaluation by captions, and their metrics.

trainer = CaptionSeq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(..., predict_with_generate=True, remove_unused_columns=False),
    train_dataset=pairs,  # rows {"image": PIL image, "captions": [str, ...]}, as of `training.lib.pairs.load_pairs`
    eval_dataset=held_back,
    data_collator=CaptionCollator(processor),
    processing_class=processor,
    compute_metrics=caption_metrics(processor, held_back["captions"]),
)
"""

import numpy as np
import torch
from transformers import EvalPrediction, Seq2SeqTrainer

from training.lib.metrics import CiderD, bleu, corpus_diversity, rouge_l


class CaptionCollator:
    """Rows {image, captions} as a batch: pixel_values, labels and input_ids [DEC] w1 ... wn [SEP] of one caption of
    each, a random one unless `first`."""

    def __init__(self, processor, first: bool = False):
        self.processor, self.first = processor, first

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        which = [0 if self.first else int(torch.randint(len(row["captions"]), ())) for row in rows]
        text = self.processor.encode_text([row["captions"][i] for row, i in zip(rows, which)], as_prompt=False)
        pixel_values = self.processor(images=[row["image"] for row in rows])["pixel_values"]
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        return {"pixel_values": pixel_values, "labels": labels, **text}


class CaptionSeq2SeqTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer whose captions are written from the image alone.

    Seq2SeqTrainer hands all inputs to `generate`, so BLIP is given the right caption as its prompt, and is rated for
    repeating it.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.accelerator.unwrap_model(model)(**inputs).loss.detach()
            settings = {
                "max_new_tokens": self.args.generation_max_length or 20,
                "num_beams": self.args.generation_num_beams,
            }
            settings = {name: value for name, value in settings.items() if value is not None} | gen_kwargs
            said = self.accelerator.unwrap_model(model).generate(pixel_values=inputs["pixel_values"], **settings)
        longest = 1 + settings["max_new_tokens"]
        pad = model.config.text_config.pad_token_id if hasattr(model, "config") else 0
        said = torch.nn.functional.pad(said, (0, max(0, longest - said.shape[1])), value=pad)
        return loss, said, inputs["labels"]


def caption_metrics(processor, references: list[list[str]]):
    """`compute_metrics` for `CaptionSeq2SeqTrainer`: CIDEr-D, BLEU-4, ROUGE-L (points), vocabulary, mean length.

    Args:
        references: captions of each image of the evaluation set, in its order.
    """
    scorer = CiderD(references)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions < 0, processor.tokenizer.pad_token_id, prediction.predictions)
        captions = processor.captions(torch.from_numpy(ids))
        if len(captions) != len(references):
            raise ValueError(
                f"{len(captions)} captions, but references of {len(references)} images: give those of the evaluation set"
            )
        diversity = corpus_diversity(captions)
        return {
            "cider_d": 100 * scorer.scores(captions).mean(),
            "bleu_4": 100 * bleu(captions, references)[3],
            "rouge_l": 100 * float(np.mean([rouge_l(c, rs) for c, rs in zip(captions, references)])),
            "vocabulary": diversity["vocabulary"],
            "mean_length": diversity["mean_length"],
        }

    return compute
