#!/usr/bin/env bash
# Weights for rarer words, for the RBMs of experiments/seeds: half an hour.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

seed=0
for model in "$EMBEDDED" runs/phrases-1/best runs/phrases-2/best; do
    "$PYTHON" -m training.tune_decoding training/recipes/decoding-varied.yaml --model "$model" --dataset "$DATASET" \
        --output_dir "runs/varied-$seed"
    "$PYTHON" -m training.evaluate_captions --model "runs/varied-$seed" --dataset "$DATASET" \
        --output "benchmarks/results/captions_varied_$seed.json"
    seed=$((seed + 1))
done
