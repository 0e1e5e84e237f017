"""Minimum-risk training: a trained captioner goes on by its own captions, those with a higher CIDEr-D made likelier.

    python -m experiments.minimum_risk.train_minimum_risk experiments/minimum_risk/captioner-small-risk.yaml \
        --model runs/captioner-finish/best --dataset flickr8k --output_dir runs/captioner-risk

It samples captions of each image. Those with a higher CIDEr-D than the image's other samples become likelier
(self-critical training, Rennie et al., CVPR 2017; the mean of the other samples as the baseline, Luo 2020, arXiv
2003.09971).
"""

import functools
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from training.lib.arguments import CaptionerArguments, DataArguments, parse_arguments
from training.lib.captions import other_tokens
from training.lib.metrics import CiderD
from training.lib.packed import packed, pad_rows
from training.lib.stage import run_stage
from training.train_captioner import CaptionTrainer, train_captioner


@dataclass
class RiskArguments:
    samples: int = field(default=4, metadata={"help": "captions sampled an image, at least 2"})
    reference_weight: float = field(default=0.1, metadata={"help": "weight of the usual loss on one reference"})


class MinimumRiskTrainer(CaptionTrainer):
    """Trains on captions that the model samples, each weighted by how much better it is than the image's others.

    Args:
        samples: captions sampled an image.
        reference_weight: weight of the usual loss on one of the image's own captions, which keeps the language.
    """

    def __init__(self, *args, samples: int, reference_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.scorer = CiderD(self.train_dataset.texts)
        self.samples, self.reference_weight = samples, reference_weight
        self.rewards = []  # since the last log
        self.model_accepts_loss_kwargs = False  # the batch's own labels are not what is trained on

    @functools.cached_property
    def never_seen(self) -> list[int]:
        return other_tokens(self.model.active, self.model.config.text_config.vocab_size)

    @torch.no_grad()
    def sample(self, model, features) -> list[list[list[int]]]:
        """Token ids [DEC] w1 ... wn [SEP] of `samples` captions of each image."""
        model.eval()
        encoding = model.encode_image(vision_hidden_states=features, rbm=False)
        start = torch.full((len(features) * self.samples, 1), model.decoder_input_ids)
        sequences = model.generate(
            encoding=encoding, input_ids=start, rbm=False, do_sample=True, num_beams=1, top_k=0,
            max_new_tokens=self.generation["max_new_tokens"], suppress_tokens=self.never_seen,
        )  # fmt: skip
        model.train()
        sep = self.processor.tokenizer.sep_token_id
        ended = [row[: row.index(sep) + 1] if sep in row else row for row in sequences.tolist()]
        return [ended[i : i + self.samples] for i in range(0, len(ended), self.samples)]

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        features = inputs["vision_hidden_states"]
        rows = []
        for index, captions in zip(inputs["index"].tolist(), self.sample(model, features)):
            texts = self.processor.captions([torch.tensor(caption) for caption in captions])
            reward = torch.tensor([self.scorer.score(index, text) for text in texts])
            others = (reward.sum() - reward) / (self.samples - 1)
            self.rewards.append(reward.mean().item())
            own = self.train_dataset.captions[index]
            captions.append(own[int(torch.randint(len(own), ()))])
            value = [*(reward - others).tolist(), self.reference_weight]
            weights = [v for caption, v in zip(captions, value) for _ in caption[:-1]]
            rows.append(packed(captions) | {"weights": weights})
        return model(vision_hidden_states=features, **pad_rows(rows))["loss"]

    def log(self, logs, *args, **kwargs):
        if self.rewards and "loss" in logs:
            logs["sampled_cider"] = 100 * sum(self.rewards) / len(self.rewards)
            self.rewards = []
        super().log(logs, *args, **kwargs)


def main():
    data, captioner, risk, args = parse_arguments(DataArguments, CaptionerArguments, RiskArguments, TrainingArguments)
    if risk.samples < 2:
        raise ValueError(f"--samples is {risk.samples}, but a sample is compared with the others: give 2 or more")
    if captioner.tower_learning_rate:
        raise ValueError("--tower_learning_rate cannot be used here: captions are sampled from cached features")
    trainer_class = functools.partial(MinimumRiskTrainer, samples=risk.samples, reference_weight=risk.reference_weight)
    train_captioner(data, captioner, args, trainer_class=trainer_class)


if __name__ == "__main__":
    run_stage(main)
