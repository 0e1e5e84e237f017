"""Show a data set as every stage reads it: `python -m training.pairs --dataset DATASET`."""

from training.lib.pairs import PairStream, load_pairs, main, read_pairs, read_texts, unknown_token_message
from training.lib.stage import run_stage


__all__ = ["PairStream", "load_pairs", "read_pairs", "read_texts", "unknown_token_message"]

if __name__ == "__main__":
    run_stage(main)
