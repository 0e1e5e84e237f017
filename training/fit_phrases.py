"""Stage 2b: fit what the RBM's hidden causes say of phrases, in closed form, on the same cached features. Seconds,
after `train_rbm`.

    python -m training.fit_phrases --model runs/rbm/best --dataset flickr8k --output_dir runs/phrases

The mean CIDEr vector of an image's captions is regressed on P(h = 1 | x), ridge regression, the RBM as it is
(`modeling_blip_rbm/phrases_blip_rbm.py`). Re-rank can then ask which CIDEr-D a candidate may expect;
`training.tune_decoding` chooses its weight. `phrases.json` says how much of the vectors of held-back images is
explained, and what their own captions may expect.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn.utils.rnn import pad_sequence

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.phrases_blip_rbm import ORDERS, PhraseBlock, length_factors, ngram_numbers
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import caption_tokens
from training.lib.checkpoints import refuse_other_output, save_captioner, write_json
from training.lib.data import split_held_back
from training.lib.distributed import own_processes
from training.lib.features import load_features
from training.lib.rbm_evaluation import image_inputs
from training.lib.stage import run_stage


@dataclass
class PhraseArguments:
    model: str = field(metadata={"help": "folder or Hub id of a captioner with a trained RBM"})
    output_dir: str = field(metadata={"help": "where the captioner with its phrases goes, and phrases.json"})
    min_images: int = field(
        default=10, metadata={"help": "a phrase is said in the captions of so many training images"}
    )
    ridge: float = field(
        default=0.1, metadata={"help": "penalty on the weights, as a share of the causes' mean variance"}
    )


def words_of(processor, captions: list[list[str]]) -> tuple[torch.Tensor, np.ndarray]:
    """Token ids (m, T) of all captions, words alone, padded; and the image (m,) of each."""
    texts = [text for of_image in captions for text in of_image]
    rows = [torch.tensor(ids[1:-1], dtype=torch.long) for ids in caption_tokens(processor, texts)]
    image = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
    return pad_sequence(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id), image


def choose_phrases(
    words: torch.Tensor, image: np.ndarray, pad: int, min_images: int, hidden_size: int, vocab_size: int
) -> PhraseBlock:
    """A block of the n-grams of captions `words` (m, T) that the captions of enough images have, with their document
    frequencies; `image` (m,) is whose each caption is.

    Raises:
        ValueError: if there is none.
    """
    numbers, counts = [], []
    for n in ORDERS:
        number, kept = ngram_numbers(words, n, (pad,), vocab_size + 1)
        said = np.stack([np.broadcast_to(image[:, None], kept.shape)[kept], number[kept].numpy()])
        number, images = np.unique(np.unique(said, axis=1)[1], return_counts=True)
        numbers.append(number[images >= min_images])
        counts.append(images[images >= min_images])
    numbers, counts = torch.from_numpy(np.concatenate(numbers)), torch.from_numpy(np.concatenate(counts))
    if not len(numbers):
        raise ValueError(f"no phrase is said in the captions of {min_images} images: lower --min_images")
    order = numbers.argsort()
    block, log_images = PhraseBlock(len(numbers), hidden_size, vocab_size), np.log(len(set(image.tolist())))
    block.numbers.copy_(numbers[order])
    block.idf.copy_(log_images - counts[order].double().log())
    block.unknown_idf.fill_(log_images)
    block.length_factor.copy_(length_factors((words != pad).sum(-1)))
    return block


def mean_vectors(block: PhraseBlock, words: torch.Tensor, image: np.ndarray, pad: int) -> csr_matrix:
    """(images, P) mean phi of each image's captions, words (m, T), image (m,)."""
    columns, values = (part.numpy() for part in block.vectors(words, (pad,)))
    values = values / np.bincount(image)[image, None]
    shape = image.max() + 1, len(block.numbers)
    rows = np.broadcast_to(image[:, None], columns.shape)
    return csr_matrix((values.ravel(), (rows.ravel(), columns.ravel())), shape)


def fit(block: PhraseBlock, causes: list[torch.Tensor], targets: csr_matrix, ridge: float):
    """Ridge regression of `targets` (n, P) on q (n, H), of every view of the images alike, into the block."""
    mean = torch.cat(causes).double().mean(0)
    centred = [(q.double() - mean) for q in causes]
    gram = sum(q.T @ q for q in centred)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    of_causes = torch.from_numpy(targets.T @ sum(centred).numpy())  # (P, H)
    weight = torch.linalg.solve(gram, of_causes.T).T
    block.weight.copy_(weight)
    block.bias.copy_(torch.from_numpy(np.asarray(targets.mean(0)).ravel()) - weight @ mean)


def quality(
    block: PhraseBlock, causes: torch.Tensor, words: torch.Tensor, image: np.ndarray, pad: int
) -> dict[str, float]:
    """Of images that were not fitted: the share of the vectors' variance that is explained (of the mean vector's
    error), and the CIDEr-D that their own captions may expect and those of other images."""
    targets = mean_vectors(block, words, image, pad).toarray()
    predicted = (block.bias + causes @ block.weight.T).numpy()
    error, usual = (((targets - guess) ** 2).sum() for guess in (predicted, targets.mean(0)))
    own = block.expected_cider(causes[image], words[:, None], (pad,)).mean()
    others = block.expected_cider(causes[np.roll(image, len(image) // 2)], words[:, None], (pad,)).mean()
    return {"explained": float(1 - error / usual), "own_captions": own.item(), "other_captions": others.item()}


@torch.no_grad()
def main():
    data, args = parse_arguments(DataArguments, PhraseArguments)
    refuse_other_output(args.output_dir)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(own_processes().device)
    rbm, text = model.rbm_layer.rbm, model.config.text_config
    dataset, store = load_features(
        data, model.vision_model, processor.image_processor, pooling=model.config.rbm_pooling
    )
    start = time.time()
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"][:]
    causes_of = lambda rows, view: torch.sigmoid(image_inputs(rbm, store, rows, view)).cpu()
    pad = text.pad_token_id
    words, image = words_of(processor, [captions[row] for row in train_rows])
    block = choose_phrases(words, image, pad, args.min_images, rbm.hidden_size, text.vocab_size)
    targets = mean_vectors(block, words, image, pad)
    fit(block, [causes_of(train_rows, view) for view in range(store.num_views)], targets, args.ridge)
    model.set_phrases(block)
    held_back = quality(block, causes_of(held_rows, 0), *words_of(processor, [captions[row] for row in held_rows]), pad)
    report = {"seconds": time.time() - start, "phrases": len(block.numbers), "held_back": held_back}
    save_captioner(model, processor, Path(args.output_dir) / "best")
    write_json(Path(args.output_dir) / "phrases.json", report | {"arguments": asdict(args), "data": asdict(data)})
    print(f"{args.output_dir}/best: {report}")


if __name__ == "__main__":
    run_stage(main)
