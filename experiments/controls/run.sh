#!/usr/bin/env bash
# The embedded model with other things in the place of its RBM, on three kinds of photographs: an hour.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

WEB=${WEB:-../shared/data/web}
COCO=${COCO:-../shared/data/coco}
"$PYTHON" -m experiments.controls --model "$EMBEDDED" --dataset "$DATASET" "$WEB" --held_back 1000 --views 2 \
    --worlds "$DATASET" "$WEB" "$COCO" --output experiments/controls/controls.json
"$PYTHON" -m training.report
