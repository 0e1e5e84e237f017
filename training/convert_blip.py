"""Stage 0 for a BLIP that is trained already: a BLIP-RBM that says the same, ready for `training.train_rbm`.

python -m training.convert_blip --blip Salesforce/blip-image-captioning-base --output_dir runs/blip-base
"""

import argparse

from transformers import AutoImageProcessor, AutoTokenizer

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.checkpoints import refuse_other_output, save_captioner
from training.lib.stage import run_stage


def main():
    parser = argparse.ArgumentParser(description="Convert a BLIP captioning checkpoint; its captions stay the same.")
    parser.add_argument("--blip", required=True, help="folder or Hub id of a BLIP captioning model")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    refuse_other_output(args.output_dir)
    model = BlipRBMForConditionalGeneration.from_blip(args.blip)
    tokenizer = AutoTokenizer.from_pretrained(args.blip)
    start = tokenizer.convert_ids_to_tokens(model.config.text_config.bos_token_id)
    if start is None:
        raise ValueError(
            f"the decoder of {args.blip} starts captions with token {model.config.text_config.bos_token_id}, which its tokenizer of "
            f"{len(tokenizer)} tokens lacks: the two do not belong together"
        )
    tokenizer.bos_token = start  # BLIP's tokenizers do not say so
    processor = BlipRBMProcessor(AutoImageProcessor.from_pretrained(args.blip), tokenizer)
    save_captioner(model, processor, args.output_dir)
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters; says what {args.blip} says")


if __name__ == "__main__":
    run_stage(main)
