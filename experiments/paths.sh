# What every run.sh reads: from the root of the repository, with the data and encoders that these variables name.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
# A folder or Hub id with `image` and `captions` columns, a vision encoder and a text encoder.
DATASET=${DATASET:-../shared/data/flickr8k}
VISION=${VISION:-../shared/weights/efficientnet-lite2}
TEXT=${TEXT:-../shared/weights/all-minilm-l6-v2}
# Another vision encoder; NAME@8,10 names layers.
SECOND=${SECOND:-../shared/weights/dinov2-small}
EMBEDDED=checkpoints/blip-rbm-small
