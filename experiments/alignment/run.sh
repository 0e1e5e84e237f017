#!/usr/bin/env bash
# Train and compare alignment layers, study frozen encoders, and caption on aligned tokens: 3 hours on two cores.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

align=("$PYTHON" -m training.align)
for held_back in 400 0; do
    flags=(--views 4 --text "$TEXT" --dataset "$DATASET" --held_back "$held_back")
    runs=runs/align-$held_back
    for kind in probe sail rbm; do
        "${align[@]}" "training/recipes/align-$kind.yaml" "${flags[@]}" --vision "$VISION" "$EMBEDDED" --output_dir "$runs/$kind"
    done
    "${align[@]}" training/recipes/align-rbm.yaml "${flags[@]}" --vision "$VISION" "$SECOND@8,10,12" "$EMBEDDED" --output_dir "$runs/rbm-all"
    "${align[@]}" training/recipes/align-rbm.yaml "${flags[@]}" --vision "$SECOND@8,10,12" --output_dir "$runs/rbm-dino"
done
"${align[@]}" experiments/alignment/align-sail-sigmoid.yaml --views 4 --vision "$VISION" "$EMBEDDED" --text "$TEXT" \
    --dataset "$DATASET" --output_dir runs/align-400/sail-sigmoid
"$PYTHON" -m experiments.alignment.evaluate_alignment --runs runs/align-400/{probe,sail,rbm,rbm-all,rbm-dino,sail-sigmoid} \
    --dataset "$DATASET" --output experiments/alignment/alignment.json

# Do classes cluster where encoders align well?
"$PYTHON" -m experiments.alignment.evaluate_alignment --study --vision "$VISION" "$SECOND@4,6,8,10,12" "$EMBEDDED" --text "$TEXT" \
    --dataset "$DATASET" --max_images 2000 --output runs/alignment_study.json
mv runs/alignment_study.json experiments/alignment/
mv runs/alignment_study.png docs/alignment-study.png

# The way from image to words anew, on raw and on aligned tokens, equal steps.
"${align[@]}" training/recipes/align-sail.yaml --vision "$VISION" --text "$TEXT" --dataset "$DATASET" --output_dir runs/align-sail-raw
for way in raw aligned; do
    aligned=()
    if [ "$way" = aligned ]; then aligned=(--aligned runs/align-sail-raw); fi
    "$PYTHON" -m training.build_captioner --decoder "$EMBEDDED" --vision "$VISION" "${aligned[@]}" --output_dir "runs/$way-start"
    "$PYTHON" -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model "runs/$way-start" "${aligned[@]}" \
        --dataset "$DATASET" --output_dir "runs/way-$way"
    cp "runs/way-$way/captioner.json" "experiments/alignment/captioner_$way.json"
done
