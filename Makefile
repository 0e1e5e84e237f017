# `make` lists the targets. Everything is installed into .venv (make test-min: .venv-min) from pinned requirements.

PYTHON ?= python3
# Without an accelerator, a CPU build of torch saves gigabytes: give pip its index, e.g. make demo PIP_FLAGS="--index-url ..."
PIP_FLAGS ?=
# Data of the training stages: a folder or Hub id with `image` and `captions` columns.
DATASET ?= ../shared/data/flickr8k
VISION ?= ../shared/weights/efficientnet-lite2
TEXT ?= ../shared/weights/all-minilm-l6-v2
# Of the results of bench-generate beside others' of another processor, such as _amx.
SUFFIX ?=
# Another vision encoder, beside VISION and the embedded captioner's; @ names layers.
SECOND ?= ../shared/weights/dinov2-small
STUDY ?= $(SECOND)@4,6,8,10,12 checkpoints/blip-rbm-small
RUN = .venv/bin/python
ALIGNED = probe sail rbm rbm-all rbm-dino
ALIGN = .venv/bin/accelerate launch --config_file training/accelerate/cpu.yaml -m training.align

.DEFAULT_GOAL := help
.PHONY: help align aligned-captioner capfilt noise diversity reranker seeds varied scale demo test test-slow test-min check report train tutorial evaluate bench bench-generate bench-contrastive clean

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

demo: .venv/installed  ## install, then caption the photographs in examples/: table, demo.html, demo.png
	$(RUN) examples/demo.py

test: .venv/installed  ## the tests (no network, nothing outside the repo)
	$(RUN) -m pytest -q -n auto

test-slow: .venv/installed  ## the checks that take minutes
	$(RUN) -m pytest -q -m slow

align: .venv/installed  ## SAIL on VISION and TEXT: probe, gated layer and RBM, trained and compared; retrieval in two steps (3 hours)
	for held_back in 400 0; do \
		flags="--views 4 --text $(TEXT) --dataset $(DATASET) --held_back $$held_back"; \
		for kind in probe sail rbm; do \
			$(ALIGN) training/recipes/align-$$kind.yaml $$flags --vision $(VISION) checkpoints/blip-rbm-small \
				--output_dir runs/align-$$held_back/$$kind || exit 1; \
		done; \
		$(ALIGN) training/recipes/align-rbm.yaml $$flags --vision $(VISION) $(SECOND)@8,10,12 checkpoints/blip-rbm-small \
			--output_dir runs/align-$$held_back/rbm-all || exit 1; \
		$(ALIGN) training/recipes/align-rbm.yaml $$flags --vision $(SECOND)@8,10,12 --output_dir runs/align-$$held_back/rbm-dino || exit 1; \
	done
	$(ALIGN) training/recipes/align-sail-sigmoid.yaml --views 4 --vision $(VISION) checkpoints/blip-rbm-small --text $(TEXT) \
		--dataset $(DATASET) --output_dir runs/align-400/sail-sigmoid
	$(RUN) -m experiments.alignment.evaluate_alignment --runs $(addprefix runs/align-400/,$(ALIGNED) sail-sigmoid) --dataset $(DATASET) \
		--output experiments/alignment/alignment.json
	$(RUN) -m training.build_captioner --decoder checkpoints/blip-rbm-small --vision $(SECOND)@10 --output_dir runs/second-start
	$(RUN) -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/second-start \
		--dataset $(DATASET) --output_dir runs/second-captioner
	cp runs/second-captioner/captioner.json experiments/retrieval/captioner_second.json
	OMP_NUM_THREADS=1 .venv/bin/accelerate launch --config_file training/accelerate/multi-cpu.yaml -m experiments.retrieval.rerank_retrieval \
		--runs $(addprefix runs/align-400/,$(ALIGNED)) --final_runs $(addprefix runs/align-0/,$(ALIGNED)) \
		--captioners checkpoints/blip-rbm-small runs/second-captioner/best \
		--dataset $(DATASET) --output experiments/retrieval/retrieval.json
	$(RUN) -m experiments.alignment.evaluate_alignment --study --vision $(VISION) $(STUDY) --text $(TEXT) --dataset $(DATASET) \
		--max_images 2000 \
		--output experiments/alignment/alignment_study.json
	mv benchmarks/results/alignment_study.png docs/alignment-study.png

capfilt: .venv/installed  ## how well exchanged captions are found, 30 % and 60 % of them, on DATASET
	for share in 30 60; do \
		$(RUN) -m training.capfilt --model checkpoints/blip-rbm-small --dataset $(DATASET) --shuffle 0.$$share --rounds 3 --views 2 \
			--output_dir runs/capfilt-$$share || exit 1; \
		cp runs/capfilt-$$share/capfilt.json experiments/capfilt/capfilt_$$share.json; \
	done

noise: .venv/installed  ## captioners on noisy pairs, on what CapFilt keeps of them, and with synthetic captions, on DATASET (2 hours)
	$(RUN) -m experiments.noise.noise --vision $(VISION) --dataset $(DATASET) --output experiments/noise/noise.json

aligned-captioner: .venv/installed  ## a captioner's way from image to words on raw and on aligned tokens, equal steps, on DATASET
	$(ALIGN) training/recipes/align-sail.yaml --vision $(VISION) --text $(TEXT) --dataset $(DATASET) --output_dir runs/align-sail-raw
	$(RUN) -m training.build_captioner --decoder checkpoints/blip-rbm-small --vision $(VISION) --output_dir runs/raw-start
	$(RUN) -m training.build_captioner --decoder checkpoints/blip-rbm-small --vision $(VISION) --aligned runs/align-sail-raw \
		--output_dir runs/aligned-start
	$(RUN) -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/raw-start \
		--dataset $(DATASET) --output_dir runs/way-raw
	$(RUN) -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/aligned-start \
		--aligned runs/align-sail-raw --dataset $(DATASET) --output_dir runs/way-aligned
	cp runs/way-raw/captioner.json experiments/alignment/captioner_raw.json
	cp runs/way-aligned/captioner.json experiments/alignment/captioner_aligned.json

# The writers' way from image to words is trained without the images that they write for; the decoder's language is the embedded one's.
reranker: .venv/installed  ## fit the RBM's energy to candidates of two captioners, each for images that it has not seen, on DATASET (an hour)
	$(RUN) -m training.build_captioner --decoder checkpoints/blip-rbm-small --vision $(VISION) --output_dir runs/raw-start
	for fold in 0 1; do \
		$(RUN) -m training.train_captioner training/recipes/captioner-cross-attention.yaml --model runs/raw-start --num_train_epochs 3 \
			--folds 2 --fold $$fold --dataset $(DATASET) --output_dir runs/fold-$$fold || exit 1; \
	done
	$(RUN) -m experiments.reranker.train_reranker experiments/reranker/reranker-small.yaml --model checkpoints/blip-rbm-small \
		--writer runs/fold-0/best runs/fold-1/best --dataset $(DATASET) --output_dir runs/reranker
	cp runs/reranker/reranker.json experiments/reranker/reranker.json

scale: .venv/installed  ## what the RBM stage takes: the ten-minute path on DATASET, memory at 6,000 and 60,000 images
	rm -rf runs/scale
	.venv/bin/accelerate launch --config_file training/accelerate/cpu.yaml -m training.train_rbm training/recipes/rbm-quick.yaml \
		--model checkpoints/blip-rbm-small --dataset $(DATASET) --output_dir runs/scale/rbm --cache_dir runs/scale/features
	cp runs/scale/rbm/rbm.json benchmarks/results/rbm_quick.json
	$(RUN) -m benchmarks.scale --output benchmarks/results/scale.json

test-min: .venv-min/installed  ## the model's tests on transformers 4.57, in an environment of its own
	.venv-min/bin/python -m pytest -q tests/modeling_blip_rbm/test_rbm.py tests/modeling_blip_rbm/test_configuration.py tests/modeling_blip_rbm/test_linear.py tests/modeling_blip_rbm/test_modeling.py \
		tests/modeling_blip_rbm/test_decoding.py tests/modeling_blip_rbm/test_processing.py tests/modeling_blip_rbm/test_pipeline.py tests/modeling_blip_rbm/test_hub.py tests/modeling_blip_rbm/test_cli.py \
		tests/modeling_blip_rbm/test_checkpoint.py

check: .venv/installed  ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

report: .venv/installed  ## renew what is derived: tables in README.md and model_card.md, the embedded model's code
	$(RUN) -m training.report

train: .venv/installed  ## make the embedded model again, in runs/blip-rbm-small, from DATASET, VISION and TEXT (about 4 hours on 2 cores)
	$(RUN) -m training.build_captioner --vision $(VISION) --text $(TEXT) --output_dir runs/untrained
	$(RUN) -m training.train_captioner training/recipes/captioner-small.yaml --model runs/untrained \
		--dataset $(DATASET) --output_dir runs/captioner
	$(RUN) -m training.train_captioner training/recipes/captioner-small-finish.yaml --model runs/captioner/best \
		--dataset $(DATASET) --output_dir runs/captioner-finish
	$(RUN) -m training.average_captioners runs/captioner-finish/best runs/captioner-finish/last --output_dir runs/captioner-average
	$(RUN) -m training.train_captioner training/recipes/captioner-small-tower.yaml --model runs/captioner-average/best \
		--dataset $(DATASET) --output_dir runs/captioner-tower
	$(RUN) -m training.shrink_vocabulary --model runs/captioner-tower/best --dataset $(DATASET) --output_dir runs/captioner-shrunk/best
	.venv/bin/accelerate launch --config_file training/accelerate/cpu.yaml -m training.train_rbm training/recipes/rbm-small.yaml \
		--model runs/captioner-shrunk/best --dataset $(DATASET) --output_dir runs/rbm
	$(RUN) -m training.fit_phrases --views 2 --model runs/rbm/best --dataset $(DATASET) --output_dir runs/phrases
	$(RUN) -m training.tune_decoding training/recipes/decoding-small.yaml --model runs/phrases/best \
		--dataset $(DATASET) --output_dir runs/blip-rbm-small
	$(RUN) -m training.evaluate_confidence --model runs/blip-rbm-small --dataset $(DATASET) --output runs/blip-rbm-small/confidence.json
	cp runs/captioner-tower/captioner.json runs/rbm/rbm.json runs/phrases/phrases.json runs/blip-rbm-small/

tutorial: .venv/installed  ## the stages on eight photographs of our own, to a repo staged for the Hub: two minutes
	$(RUN) -m training.pairs --dataset examples/captions.jsonl
	.venv/bin/accelerate launch --config_file training/accelerate/cpu.yaml -m training.train_rbm training/recipes/tutorial.yaml \
		--model checkpoints/blip-rbm-small --dataset examples/captions.jsonl --output_dir runs/tutorial/rbm
	$(RUN) -m training.tune_decoding --model runs/tutorial/rbm/best --dataset examples/captions.jsonl --held_back 2 --views 2 \
		--candidates 4 --prior 0 --repetition_penalty 1.1 --length_penalty 1.2 --guidance 0 0.1 --output_dir runs/tutorial/model
	$(RUN) -m training.publish --model runs/tutorial/model --repo_id me/my-blip-rbm --dry_run

evaluate: .venv/installed  ## measure checkpoints/blip-rbm-small on DATASET's validation split
	$(RUN) -m training.evaluate_captions --model checkpoints/blip-rbm-small --dataset $(DATASET) --ablation true \
		--output checkpoints/blip-rbm-small/results.json --pictures runs/report
	$(RUN) -m training.evaluate_confidence --model checkpoints/blip-rbm-small --dataset $(DATASET) \
		--output checkpoints/blip-rbm-small/confidence.json
	mv checkpoints/blip-rbm-small/confidence.png docs/confidence.png
	cp checkpoints/blip-rbm-small/results.json benchmarks/results/captions_seed_0.json

# On the embedded captioner, with plain BLIP's decoding as it is. Seed 0 is the embedded model itself, which `evaluate` measures.
seeds: .venv/installed  ## train, tune and measure the RBM from two more seeds on DATASET (an hour)
	for seed in 1 2; do \
		.venv/bin/accelerate launch --config_file training/accelerate/cpu.yaml -m training.train_rbm training/recipes/rbm-small.yaml \
			--seed $$seed --model checkpoints/blip-rbm-small --dataset $(DATASET) --output_dir runs/rbm-$$seed || exit 1; \
		$(RUN) -m training.fit_phrases --views 2 --model runs/rbm-$$seed/best --dataset $(DATASET) --output_dir runs/phrases-$$seed || exit 1; \
		$(RUN) -m training.tune_decoding training/recipes/decoding-small.yaml --prior 0 --repetition_penalty 1.1 --length_penalty 1.0 \
			--model runs/phrases-$$seed/best --dataset $(DATASET) --output_dir runs/seed-$$seed || exit 1; \
		$(RUN) -m training.evaluate_captions --model runs/seed-$$seed --dataset $(DATASET) \
			--output benchmarks/results/captions_seed_$$seed.json || exit 1; \
	done

# After `seeds`: other weights for the same three RBMs.
varied: .venv/installed  ## more different words: the three RBMs with re-rank and guide that favour rare ones (half an hour)
	seed=0; for model in checkpoints/blip-rbm-small runs/phrases-1/best runs/phrases-2/best; do \
		$(RUN) -m training.tune_decoding training/recipes/decoding-varied.yaml --model $$model --dataset $(DATASET) \
			--output_dir runs/varied-$$seed || exit 1; \
		$(RUN) -m training.evaluate_captions --model runs/varied-$$seed --dataset $(DATASET) \
			--output benchmarks/results/captions_varied_$$seed.json || exit 1; \
		seed=$$((seed + 1)); \
	done

diversity: .venv/installed  ## several captions of an image: sampled causes beside sampling, nucleus, diverse and plain beams
	$(RUN) -m experiments.diversity.evaluate_diversity --model checkpoints/blip-rbm-small --dataset $(DATASET) --max_images 200 \
		--output experiments/diversity/diversity.json
	mv benchmarks/results/diversity.png docs/diversity.png

bench: .venv/installed  ## speed and likelihood of the RBM beside its peers, cost of the guide's word gains (needs a quiet machine)
	.venv/bin/pip install --quiet $(PIP_FLAGS) -r benchmarks/requirements.txt
	$(RUN) -m benchmarks.rbm --output benchmarks/results/rbm.json
	$(RUN) -m benchmarks.rbm_likelihood --output benchmarks/results/rbm_likelihood.json
	$(RUN) examples/digits_rbm.py --output benchmarks/results/digits_rbm
	mv benchmarks/results/digits_rbm.png docs/digits-rbm.png
	$(RUN) -m benchmarks.guidance

bench-generate: .venv/installed  ## speed of generate beside transformers' own BLIP and the processor's bounds, time of captioning a folder (an hour, needs a quiet machine)
	$(RUN) -m benchmarks.generate --models blip_base --batches 4 1 --output benchmarks/results/generate$(SUFFIX).json
	$(RUN) -m benchmarks.generate --models blip_base --batches 16 --beams 3 --output benchmarks/results/generate_16$(SUFFIX).json
	$(RUN) -m benchmarks.generate_bound --output benchmarks/results/generate_bound$(SUFFIX).json
	$(RUN) -m benchmarks.generate --models embedded --batches 16 4 1 --output benchmarks/results/generate_embedded$(SUFFIX).json
	$(RUN) -m benchmarks.folder --dataset $(DATASET) --output benchmarks/results/folder.json
	$(RUN) -m training.evaluate_captions --model checkpoints/blip-rbm-small --dataset $(DATASET) --int8 true \
		--output benchmarks/results/captions_int8.json

bench-contrastive: .venv/installed  ## memory of the contrastive losses at batches to 32,768
	$(RUN) -m benchmarks.contrastive --output benchmarks/results/contrastive.json

clean:  ## remove the environments and what demo wrote
	rm -rf .venv .venv-min demo.html demo.png
