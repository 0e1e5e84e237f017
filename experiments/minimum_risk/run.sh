#!/usr/bin/env bash
# Minimum-risk training from the best of the captioner stage.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

"$PYTHON" -m experiments.minimum_risk.train_minimum_risk experiments/minimum_risk/captioner-small-risk.yaml \
    --model "${MODEL:-runs/captioner/best}" --dataset "$DATASET" --output_dir runs/captioner-risk
