#!/usr/bin/env bash
# Sheets of 50 images of each kind, to be judged by eye: pages and an empty judgements.tsv in runs/sheet-NAME.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

DATA=${DATA:-../shared/data}
# Further models to judge beside the embedded one, such as OTHERS="runs/old".
read -ra others <<<"${OTHERS:-}"
for name in flickr8k web coco; do
    "$PYTHON" -m experiments.by_eye --model "$EMBEDDED" "${others[@]}" --dataset "$DATA/$name" --output "runs/sheet-$name"
done
