"""Several captions of an image that are about different things: each is guided by hidden causes of its own, drawn from the RBM.

python examples/varied_captions.py --images examples
"""

import argparse

import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline, BlipRBMProcessor
from modeling_blip_rbm.files import image_files


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="checkpoints/blip-rbm-small", help="folder or Hub id")
parser.add_argument("--images", default="examples", help="a folder")


def main(args):
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    captioner = BlipRBMImageToTextPipeline(model=model, processor=BlipRBMProcessor.from_pretrained(args.model))
    beams = {"num_beams": 3, "num_return_sequences": 3, "rbm_rerank": False}
    for file in image_files([args.images]):
        torch.manual_seed(0)
        varied = captioner(file, num_return_sequences=3, rbm_diversity=0.4)
        print(f"{file.name}: beam search: {' | '.join(one['generated_text'] for one in captioner(file, **beams))}")
        print(f"{file.name}: sampled causes: {' | '.join(one['generated_text'] for one in varied)}")


if __name__ == "__main__":
    main(parser.parse_args())
