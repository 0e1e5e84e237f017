#!/usr/bin/env bash
# Retrieval in two steps, after experiments/alignment/run.sh: a second captioner, then both look at the best candidates.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

"$PYTHON" -m training.build_captioner --decoder "$EMBEDDED" --vision "$SECOND@10" --output_dir runs/second-start
"$PYTHON" -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/second-start \
    --dataset "$DATASET" --output_dir runs/second-captioner
cp runs/second-captioner/captioner.json experiments/retrieval/captioner_second.json
OMP_NUM_THREADS=1 "$PYTHON" -m accelerate.commands.launch --config_file training/accelerate/multi-cpu.yaml \
    -m experiments.retrieval.rerank_retrieval --runs runs/align-400/{probe,sail,rbm,rbm-all,rbm-dino} \
    --final_runs runs/align-0/{probe,sail,rbm,rbm-all,rbm-dino} --captioners "$EMBEDDED" runs/second-captioner/best \
    --dataset "$DATASET" --output experiments/retrieval/retrieval.json
