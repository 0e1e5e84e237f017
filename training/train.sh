#!/usr/bin/env bash
# checkpoints/blip-rbm-small again, in runs/blip-rbm-small: 3 hours on two cores. training/README.md says what each stage is for.
# A stage that is stopped goes on from its last checkpoint; one whose result is there is passed over.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
HUMAN=${HUMAN:?pairs with captions that people wrote: a folder or Hub id}
WEB=${WEB:?noisy pairs of the web}
TEXTS=${TEXTS:?files of captions without images, separated by blanks, with ,without=DATASET:SPLIT where some are to be left out}
VISION=${VISION:?a vision encoder}
TEXT=${TEXT:?a BERT-type text encoder}
CLASS_HEAD=${CLASS_HEAD:?a file with the weights of the classification head of the vision encoder}
RUNS=${RUNS:-runs}

texts() { for file in $TEXTS; do echo "$file,text=true,weight=$1"; done; }
stage() {  # OUTPUT MODULE ARGUMENTS...: unless OUTPUT is there
    local output=$1
    shift
    [ -e "$output" ] || "$PYTHON" -m "training.$@"
}

# words: of the texts alone, then of images, of people and of the web
stage $RUNS/built/config.json build_captioner --vision "$VISION" --text "$TEXT" --sources web --output_dir $RUNS/built
stage $RUNS/untrained/config.json shrink_vocabulary --model $RUNS/built --dataset "$HUMAN" "$WEB,source=web" $(texts 1) --held_back 1000 --least 4 \
    --output_dir $RUNS/untrained
stage $RUNS/language/captioner.json train_captioner training/recipes/language.yaml --model $RUNS/untrained --dataset $(texts 0.4) \
    --held_back 2000 --output_dir $RUNS/language
stage $RUNS/begun/config.json build_captioner --vision "$VISION" --decoder $RUNS/language/best --class_head "$CLASS_HEAD" --output_dir $RUNS/begun
stage $RUNS/pretrain/captioner.json train_captioner training/recipes/pretrain.yaml --model $RUNS/begun \
    --dataset "$HUMAN" "$WEB,source=web" $(texts 0.08) --output_dir $RUNS/pretrain
stage $RUNS/finetune/captioner.json train_captioner training/recipes/finetune.yaml --model $RUNS/pretrain/best \
    --dataset "$HUMAN" "$WEB" $(texts 0.12) --output_dir $RUNS/finetune
stage $RUNS/tower/captioner.json train_captioner training/recipes/tower.yaml --model $RUNS/finetune/best \
    --dataset "$HUMAN" "$WEB" $(texts 0.08) --output_dir $RUNS/tower
# the RBM, its phrases, and the weights of guide and re-rank
stage $RUNS/rbm/rbm.json train_rbm training/recipes/rbm-small.yaml --model $RUNS/tower/best --dataset "$HUMAN" "$WEB" --output_dir $RUNS/rbm
stage $RUNS/phrases/phrases.json fit_phrases --views 2 --held_back 1000 --model $RUNS/rbm/best --dataset "$HUMAN" "$WEB" \
    --output_dir $RUNS/phrases
stage $RUNS/blip-rbm-small/tuning.json tune_decoding training/recipes/decoding-small.yaml --model $RUNS/phrases/best --dataset "$HUMAN" "$WEB" \
    --output_dir $RUNS/blip-rbm-small
# into its config: how sure a match of image and text is, and a caption
stage $RUNS/match/capfilt.json capfilt --model $RUNS/blip-rbm-small --dataset "$HUMAN" --views 2 --held_back 500 --output_dir $RUNS/match
stage $RUNS/blip-rbm-small/confidence.json evaluate_confidence --model $RUNS/blip-rbm-small --dataset "$HUMAN" --also_trained_on "$WEB" \
    --output $RUNS/blip-rbm-small/confidence.json
cp $RUNS/tower/captioner.json $RUNS/rbm/rbm.json $RUNS/phrases/phrases.json $RUNS/blip-rbm-small/
