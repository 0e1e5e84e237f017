#!/usr/bin/env bash
# Captioners on noisy pairs, on what CapFilt keeps of them, and with synthetic captions: 2 hours on two cores.
set -euo pipefail
. "$(dirname "$0")/../paths.sh"

"$PYTHON" -m experiments.noise.noise --vision "$VISION" --dataset "$DATASET" --output experiments/noise/noise.json
