"""Look at a data set as every stage reads it: `python -m training.pairs --dataset DATASET`."""

from training.lib.pairs import load_pairs, main, read_pairs


__all__ = ["load_pairs", "read_pairs"]

if __name__ == "__main__":
    main()
