"""Captions for a Hugging Face data set: as new columns, one after the other from a generator, and by a DataLoader with workers.

python examples/caption_dataset.py --images examples
"""

import argparse
from pathlib import Path

from datasets import Dataset, Image
from torch.utils.data import DataLoader

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline, BlipRBMProcessor
from modeling_blip_rbm.files import image_files


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="checkpoints/blip-rbm-small", help="folder or Hub id")
parser.add_argument("--images", default="examples", help="a folder")


def main(args):
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    processor = BlipRBMProcessor.from_pretrained(args.model)
    captioner = BlipRBMImageToTextPipeline(model=model, processor=processor)
    files = [str(file) for file in image_files([args.images])]

    # as columns: the data set keeps them, and to_parquet, push_to_hub or another map goes on from there
    dataset = Dataset.from_dict({"file": files, "image": files}).cast_column("image", Image())
    dataset = dataset.map(captioner, batched=True, batch_size=8)  # num_proc=2 takes two processes
    for row in dataset.remove_columns("image"):
        print(f"{Path(row['file']).name}: {row['generated_text']} ({row['score']:.2f})")

    # one after the other: a generator is never held in memory as a whole
    for file, captions in zip(files, captioner((file for file in files), batch_size=4)):
        assert captions[0]["generated_text"], file

    # in your own loop: the workers decode and resize while the model writes
    loader = DataLoader(files, batch_size=4, collate_fn=lambda batch: processor(images=batch), num_workers=2)
    captions = [caption for batch in loader for caption in processor.captions(model.generate(**batch))]
    print(len(captions), "captions by a DataLoader")


if __name__ == "__main__":
    main(parser.parse_args())
