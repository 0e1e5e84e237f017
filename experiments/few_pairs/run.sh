#!/usr/bin/env bash
# Four questions with their controls: hours on two cores. Every training is kept in runs/few_pairs: a stopped run goes on.
# CANDIDATES="held_back=FILE flickr8k=FILE ..." adds re-ranking; FILE is of experiments/few_pairs/learning.py, `read_candidates`.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

DATA=${DATA:-../shared/data}
MODEL=${MODEL:-$EMBEDDED}
texts=("$DATA/text/flickr30k_captions_without_flickr8k.jsonl.gz,text=true"
    "$DATA/text/coco_captions_33k.jsonl.gz,text=true,without=$DATA/coco:validation")
read -ra candidates <<<"${CANDIDATES:-}"
"$PYTHON" -m experiments.few_pairs --model "$MODEL" --dataset "$DATA/flickr8k" "$DATA/web" "${texts[@]}" --held_back 1000 --views 2 \
    --cache_dir "${CACHE:-runs/features}" --worlds "flickr8k=$DATA/flickr8k" "web=$DATA/web" "coco=$DATA/coco" \
    --candidates "${candidates[@]}" --judged experiments/few_pairs/judged_web.tsv "$@"
