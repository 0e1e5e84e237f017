#!/usr/bin/env bash
# Fit the RBM's energy to candidates of two captioners, each writing for images that it has not seen: an hour.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

"$PYTHON" -m training.build_captioner --decoder "$EMBEDDED" --vision "$VISION" --output_dir runs/fold-start
for fold in 0 1; do
    "$PYTHON" -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/fold-start --num_train_epochs 3 \
        --folds 2 --fold "$fold" --dataset "$DATASET" --output_dir "runs/fold-$fold"
done
"$PYTHON" -m experiments.reranker.train_reranker experiments/reranker/reranker-small.yaml --model "$EMBEDDED" \
    --writer runs/fold-0/best runs/fold-1/best --dataset "$DATASET" --output_dir runs/reranker
cp runs/reranker/reranker.json experiments/reranker/reranker.json
