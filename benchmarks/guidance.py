"""Guide's word gains by order: milliseconds a decoding step, and distance from the exact gains, on a trained RBM.

    python -m benchmarks.guidance --model checkpoints/blip-rbm-small

Images are those in examples/; a step is one call for 3 beams of each.
"""

import argparse
import statistics
import timeit
from functools import partial
from pathlib import Path

import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.generation_blip_rbm import RBMGuidance, words_said
from modeling_blip_rbm.rbm import WORD_GAIN_ORDERS


REPO = Path(__file__).resolve().parent.parent


def median_ms(function, repeats: int = 11) -> float:
    function()
    return 1000 * statistics.median(timeit.repeat(function, number=1, repeat=repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPO / "checkpoints" / "blip-rbm-small"))
    parser.add_argument("--beams", type=int, default=3)
    args = parser.parse_args()
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    processor = BlipRBMProcessor.from_pretrained(args.model)
    images = sorted((REPO / "examples").glob("*.jpg"))
    config, p = model.config, model.rbm_layer.rbm.parameters_fp32
    with torch.no_grad():
        encoding = model.encode_image(**processor(images=images))
        captions = model.generate(
            encoding=encoding, num_beams=args.beams, num_return_sequences=args.beams, rbm_rerank=False
        )
        said = captions[:, : captions.shape[1] // 2]  # half a caption

        def gains_of(order: str):
            vocab_size = config.text_config.vocab_size
            guide = RBMGuidance(p, encoding.hidden_input, config.rbm_word_ids, vocab_size, 1.0, 1e9, order)
            return guide.gains(words_said(said, guide.columns, len(config.rbm_word_ids)))

        exact = gains_of("exact")
        embeds = encoding.image_embeds.repeat_interleave(args.beams, 0)
        step = median_ms(lambda: model(image_embeds=embeds, input_ids=said[:, -1:]))
        print(f"K {len(config.rbm_word_ids)}, H {config.rbm_hidden_size}, {len(images)} images x {args.beams} beams")
        print(f"std of word weights {p.U.std():.3f}, of exact gains {exact.std():.3f} nats; decoder step {step:.1f} ms")
        for order in WORD_GAIN_ORDERS:
            gains = gains_of(order)
            error = (gains - exact).pow(2).mean().sqrt()
            correlation = torch.corrcoef(torch.stack([gains.flatten(), exact.flatten()]))[0, 1]
            ms = median_ms(partial(gains_of, order))
            print(f"{order:7s} {ms:8.2f} ms   rmse {error:.4f} nats   r {correlation:.5f}")


if __name__ == "__main__":
    main()
