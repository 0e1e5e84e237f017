#!/usr/bin/env bash
# Every stage on eight photographs of our own: two minutes on two cores. The model is not to be useful, but to be seen made.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/tutorial}
DATA=examples/captions.jsonl

echo "1. What a stage reads"
"$PYTHON" -m training.pairs --dataset "$DATA"

echo "2. An RBM for the embedded captioner, whose own RBM is left out"
"$PYTHON" -m training.train_rbm training/recipes/tutorial.yaml --model checkpoints/blip-rbm-small --dataset "$DATA" \
    --output_dir "$RUNS/rbm" --cache_dir "$RUNS/features"

echo "3. Weights of guide and re-rank, on two photographs that were held back"
"$PYTHON" -m training.tune_decoding --model "$RUNS/rbm/best" --dataset "$DATA" --held_back 2 --views 2 --candidates 4 --prior 0 \
    --repetition_penalty 1.1 --length_penalty 1.2 --guidance 0 0.1 --cache_dir "$RUNS/features" --output_dir "$RUNS/model"

echo "4. A repo for the Hub, loaded in a clean process; nothing is uploaded"
"$PYTHON" -m training.publish --model "$RUNS/model" --repo_id me/my-blip-rbm --dry_run
