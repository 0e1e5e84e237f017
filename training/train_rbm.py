"""Stage 2: train the RBM of a captioner. BLIP is frozen, and the vision tower's features are cached.

    python -m training.train_rbm training/recipes/rbm-small.yaml --model runs/captioner/best --dataset flickr8k \
        --output_dir runs/rbm

The loss has three terms, each with a weight of its own:

- `words`: predict the held-out words of a caption from the image and a random part of its other words, as guide does;
- `match`: InfoNCE over the pointwise mutual information of images and captions in the batch, as re-rank uses it;
- `cd`: contrastive divergence, with `--cd_persistent` from chains that go on from step to step.

The epoch with the best retrieval on held-back training images is kept. `log.jsonl` and `curves.png` show all that was
measured. A stopped run goes on from its last epoch.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import set_seed

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import say_unknown_tokens
from training.lib.checkpoints import peak_memory_mb, refuse_other_output, save_captioner, write_json
from training.lib.data import caption_words, choose_words, split_held_back
from training.lib.distributed import new_accelerator
from training.lib.features import load_features
from training.lib.rbm_objective import PooledPairs, RBMArguments
from training.lib.rbm_training import in_pieces, train, with_new_rbm
from training.lib.stage import run_stage


def main():
    data, settings = parse_arguments(DataArguments, RBMArguments)
    refuse_other_output(settings.output_dir)
    accelerator = new_accelerator(settings.seed)
    set_seed(settings.seed)
    processor = BlipRBMProcessor.from_pretrained(settings.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(settings.model).to(accelerator.device)
    pooling = settings.pooling or model.config.rbm_pooling
    start = time.time()
    with accelerator.main_process_first():
        card_file = Path(settings.output_dir) / "pairs.json" if accelerator.is_main_process else None
        dataset, store = load_features(
            data, model.vision_model, processor.image_processor, card_file=card_file, pooling=pooling
        )
    encoded = time.time()
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"]
    say_unknown_tokens(captions, processor.tokenizer)
    word_ids = choose_words(processor.tokenizer, (captions[i] for i in train_rows.tolist()), settings.num_words)
    words = caption_words(processor.tokenizer, captions, word_ids)
    model = with_new_rbm(model, word_ids, settings, in_pieces(store, train_rows), words.share(train_rows))
    held_back = (store.batch(held_rows), [words[i] for i in held_rows])
    history = train(accelerator, model, PooledPairs(store, train_rows, words, settings.seed), held_back, settings)
    if accelerator.is_main_process:
        save_captioner(model, processor, Path(settings.output_dir) / "best")
        write_json(
            Path(settings.output_dir) / "rbm.json",
            {
                "minutes": (time.time() - encoded) / 60,
                "minutes_of_encoding": (encoded - start) / 60,
                "peak_memory_mb": peak_memory_mb(),
                "num_words": len(word_ids),
                "held_back": history,
                "rbm": asdict(settings),
                "data": asdict(data),
            },
        )
        print(f"{settings.output_dir}/best: {json.dumps(history[-1])}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
