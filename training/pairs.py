"""Show a data set as every stage reads it: `python -m training.pairs --dataset DATASET`."""

from training.lib.pairs import load_pairs, main, read_pairs
from training.lib.stage import run_stage


__all__ = ["load_pairs", "read_pairs"]

if __name__ == "__main__":
    run_stage(main)
