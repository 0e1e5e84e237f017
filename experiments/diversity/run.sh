#!/usr/bin/env bash
# Several captions of an image: sampled causes beside sampling, nucleus, diverse and plain beams.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

"$PYTHON" -m experiments.diversity.evaluate_diversity --model "$EMBEDDED" --dataset "$DATASET" --max_images 200 \
    --output runs/diversity.json
mv runs/diversity.json experiments/diversity/
mv runs/diversity.png docs/diversity.png
