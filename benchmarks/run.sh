#!/usr/bin/env bash
# Every benchmark, or those that are named: bash benchmarks/run.sh [boltzmann] [generate] [contrastive] [scale] [gpu]. Needs a quiet machine.
set -euo pipefail
. "$(dirname "$0")/../experiments/paths.sh"
RESULTS=benchmarks/results
# Of results beside those of another processor, such as _amx.
SUFFIX=${SUFFIX:-}

boltzmann() { # speed and likelihood of the RBM beside its peers, cost of the guide's word gains
    "$PYTHON" -m pip install --quiet -r benchmarks/requirements.txt
    "$PYTHON" -m benchmarks.rbm --output "$RESULTS/rbm.json"
    "$PYTHON" -m benchmarks.rbm_likelihood --output "$RESULTS/rbm_likelihood.json"
    "$PYTHON" examples/digits_rbm.py --output "$RESULTS/digits_rbm"
    mv "$RESULTS/digits_rbm.png" docs/digits-rbm.png
    "$PYTHON" -m benchmarks.guidance
}

generate() { # an hour: `generate` beside transformers' own BLIP and the processor's bounds, time of captioning a folder
    "$PYTHON" -m benchmarks.generate --models blip_base --batches 4 1 --output "$RESULTS/generate$SUFFIX.json"
    "$PYTHON" -m benchmarks.generate --models blip_base --batches 16 --beams 3 --output "$RESULTS/generate_16$SUFFIX.json"
    "$PYTHON" -m benchmarks.generate_bound --output "$RESULTS/generate_bound$SUFFIX.json"
    "$PYTHON" -m benchmarks.generate --models embedded --batches 16 4 1 --output "$RESULTS/generate_embedded$SUFFIX.json"
    "$PYTHON" -m benchmarks.folder --dataset "$DATASET" --output "$RESULTS/folder.json"
    "$PYTHON" -m training.evaluate_captions --model "$EMBEDDED" --dataset "$DATASET" --int8 true --output "$RESULTS/captions_int8.json"
}

contrastive() { # memory of the contrastive losses at batches to 32,768
    "$PYTHON" -m benchmarks.contrastive --output "$RESULTS/contrastive.json"
}

scale() { # what the RBM stage takes: the ten-minute path on DATASET, memory at 6,000 and 60,000 images
    rm -rf runs/scale
    "$PYTHON" -m training.train_rbm training/recipes/rbm-quick.yaml --model "$EMBEDDED" --dataset "$DATASET" \
        --output_dir runs/scale/rbm --cache_dir runs/scale/features
    cp runs/scale/rbm/rbm.json "$RESULTS/rbm_quick.json"
    "$PYTHON" -m benchmarks.scale --output "$RESULTS/scale.json"
}

gpu() { # stock BLIP and ours on a GPU: eight minutes
    "$PYTHON" -m benchmarks.gpu --output "$RESULTS/gpu.json"
}

for name in "${@:-boltzmann generate contrastive scale}"; do
    for benchmark in $name; do
        case $benchmark in
        boltzmann | generate | contrastive | scale | gpu) "$benchmark" ;;
        *) echo "benchmarks/run.sh: $benchmark is no benchmark: boltzmann, generate, contrastive, scale or gpu" >&2 && exit 2 ;;
        esac
    done
done
