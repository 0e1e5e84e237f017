#!/usr/bin/env bash
# How well exchanged captions are found, 30 and 60 % of them.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

for share in 30 60; do
    "$PYTHON" -m training.capfilt --model "$EMBEDDED" --dataset "$DATASET" --shuffle "0.$share" --rounds 3 --views 2 \
        --output_dir "runs/capfilt-$share"
    cp "runs/capfilt-$share/capfilt.json" "experiments/capfilt/capfilt_$share.json"
done
