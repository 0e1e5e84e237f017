#!/usr/bin/env bash
# Refine by the RBM, and by an MLP of as many parameters in its place.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

recipe=experiments/mlp_adapter/refine-small.yaml
"$PYTHON" -m training.train_captioner "$recipe" --model "$EMBEDDED" --dataset "$DATASET" "${WEB:-../shared/data/web}" --output_dir runs/refine
"$PYTHON" -m experiments.mlp_adapter.train_adapter "$recipe" --model "$EMBEDDED" --dataset "$DATASET" "${WEB:-../shared/data/web}" --output_dir runs/adapter
