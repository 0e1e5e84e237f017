"""Average the weights of captioners that went on from the same one ("model soup", Wortsman et al., ICML 2022, arXiv
2203.05482).

    python -m training.average_captioners runs/captioner-finish/best runs/captioner-finish/last \
        --output_dir runs/captioner-average

One model comes out, as fast as each that went in.
"""

import argparse
import json
from pathlib import Path

import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.checkpoints import record_file, refuse_other_output, save_captioner, write_json
from training.lib.stage import run_stage


def average(models: list) -> dict[str, torch.Tensor]:
    """State dict with the mean of the models' floating-point tensors.

    Raises:
        ValueError: if the models do not have the same tensors in the same shapes.
    """
    states = [model.state_dict() for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    for other in shapes[1:]:
        differ = [name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name)]
        if differ:
            raise ValueError(f"these models are not of one kind: {', '.join(sorted(differ)[:5])} differ in shape")
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub ids of captioners")
    parser.add_argument("--output_dir", required=True, help="where the average goes, in `best`")
    args = parser.parse_args()
    refuse_other_output(args.output_dir)
    models = [BlipRBMForConditionalGeneration.from_pretrained(name) for name in args.models]
    models[0].load_state_dict(average(models))
    output = Path(args.output_dir)
    save_captioner(models[0], BlipRBMProcessor.from_pretrained(args.models[0]), output / "best")
    files = dict.fromkeys(filter(None, map(record_file, args.models)))  # a run's `best` and `last` have one
    records = [json.loads(file.read_text()) for file in files]
    report = records[0] | {"minutes": sum(record["minutes"] for record in records)} if records else {}
    write_json(output / "captioner.json", report | {"average_of": args.models})


if __name__ == "__main__":
    run_stage(main)
