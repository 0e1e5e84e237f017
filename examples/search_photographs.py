"""Finds photographs by a text, and those that the model knows least, as `blip-rbm search` and `blip-rbm energy` do with an index.

python examples/search_photographs.py --images examples --text "a cat"
"""

import argparse

import torch

from modeling_blip_rbm import BlipRBMForImageTextRetrieval, BlipRBMProcessor
from modeling_blip_rbm.files import image_files


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="checkpoints/blip-rbm-small", help="folder or Hub id")
parser.add_argument("--images", default="examples", help="a folder")
parser.add_argument("--text", default="a dog on the beach")


@torch.no_grad()
def main(args):
    model = BlipRBMForImageTextRetrieval.from_pretrained(args.model).eval()
    processor = BlipRBMProcessor.from_pretrained(args.model)
    files = image_files([args.images])
    images = processor(images=files)
    output = model(**images, **processor(text=args.text))
    print(f"best for {args.text!r}, by pointwise mutual information in nats:")
    for i in output.logits_per_image[:, 0].argsort(descending=True).tolist():
        print(f"{output.logits_per_image[i, 0]:8.2f} {files[i].name}")
    print("least like what the model knows, by the RBM's energy in nats:")
    energy = model.image_energy(images["pixel_values"])
    for i in energy.argsort(descending=True).tolist()[:3]:
        print(f"{energy[i]:8.1f} {files[i].name}")


if __name__ == "__main__":
    main(parser.parse_args())
