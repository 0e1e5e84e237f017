#!/usr/bin/env bash
# checkpoints/blip-rbm-small again, in runs/blip-rbm-small: 4 hours on two cores. training/README.md says what each stage is for.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATASET=${DATASET:?a folder or Hub id with image and captions columns}
VISION=${VISION:?a vision encoder}
TEXT=${TEXT:?a BERT-type text encoder}
data=(--dataset "$DATASET")

"$PYTHON" -m training.build_captioner --vision "$VISION" --text "$TEXT" --output_dir runs/untrained
"$PYTHON" -m training.train_captioner training/recipes/captioner-small.yaml --model runs/untrained "${data[@]}" \
    --output_dir runs/captioner
"$PYTHON" -m training.train_captioner training/recipes/captioner-small-finish.yaml --model runs/captioner/best "${data[@]}" \
    --output_dir runs/captioner-finish
"$PYTHON" -m training.average_captioners runs/captioner-finish/best runs/captioner-finish/last --output_dir runs/captioner-average
"$PYTHON" -m training.train_captioner training/recipes/captioner-small-tower.yaml --model runs/captioner-average/best "${data[@]}" \
    --output_dir runs/captioner-tower
"$PYTHON" -m training.shrink_vocabulary --model runs/captioner-tower/best "${data[@]}" --output_dir runs/captioner-shrunk
"$PYTHON" -m training.train_rbm training/recipes/rbm-small.yaml --model runs/captioner-shrunk "${data[@]}" --output_dir runs/rbm
"$PYTHON" -m training.fit_phrases --views 2 --model runs/rbm/best "${data[@]}" --output_dir runs/phrases
"$PYTHON" -m training.tune_decoding training/recipes/decoding-small.yaml --model runs/phrases/best "${data[@]}" \
    --output_dir runs/blip-rbm-small
"$PYTHON" -m training.evaluate_confidence --model runs/blip-rbm-small "${data[@]}" --output runs/blip-rbm-small/confidence.json
cp runs/captioner-tower/captioner.json runs/rbm/rbm.json runs/phrases/phrases.json runs/blip-rbm-small/
