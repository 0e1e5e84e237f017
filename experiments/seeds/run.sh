#!/usr/bin/env bash
# Train, tune and measure the RBM from two more seeds, plain BLIP's decoding as it is: an hour.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

for seed in 1 2; do
    "$PYTHON" -m training.train_rbm training/recipes/rbm-small.yaml --seed "$seed" --model "$EMBEDDED" --dataset "$DATASET" \
        --output_dir "runs/rbm-$seed"
    "$PYTHON" -m training.fit_phrases --views 2 --model "runs/rbm-$seed/best" --dataset "$DATASET" --output_dir "runs/phrases-$seed"
    "$PYTHON" -m training.tune_decoding training/recipes/decoding-small.yaml --prior 0 --repetition_penalty 1.1 --length_penalty 1.0 \
        --model "runs/phrases-$seed/best" --dataset "$DATASET" --output_dir "runs/seed-$seed"
    "$PYTHON" -m training.evaluate_captions --model "runs/seed-$seed" --dataset "$DATASET" \
        --output "benchmarks/results/captions_seed_$seed.json"
done
