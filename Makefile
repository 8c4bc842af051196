# Every target first creates the environment if it is missing or older than the lock file.
# CONFIG is a preset or a YAML file; without it, extract-features, train and sample use the demo.
#   make demo                                   all steps on the built-in demo
#   make demo ARGS="--config demo-i2v"           the same for image-to-video
#   make demo ARGS="--config demo-wan"           the same with a tiny, untrained Wan, on the demo's cache
#   make extract-features CONFIG=my.yaml ARGS="extract.device=cuda:1"
#   make train CONFIG=cogvideox-5b-lora
#   make sample PROMPT="a dog runs over a meadow"
#   make evaluate VIDEOS=outputs/lgf AGAINST=outputs/base

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= demo
ARGS   ?=
PROMPT ?=
OUT    ?=
VIDEOS ?=
AGAINST ?=
NAME   ?=
SIZE   ?=
PART   ?=
MINUTES ?= 60
BUNDLE ?=
# Number of test processes; each takes up to one core and 1.5 GB.
PROCESSES ?= 2

TORCH       := torch==2.13.0
TORCHVISION := torchvision==0.28.0
BUILD_TOOLS := $(shell grep -oE '^(setuptools|wheel)==[^ ]+' requirements.lock)
# torchvision is installed only with an NVIDIA driver: sam2 lists it but its tracker does not use it,
# and the default torchvision wheel does not fit a CPU build of torch. CUDA=1 or CUDA=0 overrides.
CUDA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0)

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
RUN       := $(BIN)/sam2vx-pipeline
# With BUNDLE, wheels from `make gpu-bundle`, the machine's own Python is used, and no network.
GPU_SITE  := build/gpu-site

.DEFAULT_GOAL := help
.PHONY: help install demo extract-features train sample evaluate test test-faults lint typecheck check docs bench evidence gpu-check gpu-bundle lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

install: $(INSTALLED)  ## create the environment in .venv from requirements.lock

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "$(PYTHON) is not Python 3.11 or 3.12; choose one: make install PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(BUILD_TOOLS) $(TORCH) $(if $(filter 1,$(CUDA)),$(TORCHVISION))
	DS_BUILD_OPS=0 SAM2_BUILD_CUDA=0 $(PIP) install --quiet --no-deps --no-build-isolation \
	  --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## run all steps on the built-in demo: data, features, training, videos, scores, images
	$(RUN) demo $(ARGS)

extract-features: install  ## stage one (CONFIG=preset or file, ARGS="key.key=value …")
	$(RUN) extract-features --config $(CONFIG) $(ARGS)

# For the demo, run stage one first: it is quick and keeps finished clips.
train: install $(if $(filter demo,$(CONFIG)),extract-features)  ## stage two; resumes a stopped run
	$(RUN) train --config $(CONFIG) $(ARGS)

sample: install  ## sample a video: make sample PROMPT="…" [OUT=video.mp4]
	@test -n "$(PROMPT)" || { echo 'PROMPT is not set: make sample PROMPT="a quadruped walks to the left"'; exit 2; }
	$(RUN) sample --config $(CONFIG) --prompt "$(PROMPT)" $(if $(OUT),--out "$(OUT)") $(ARGS)

evaluate: install $(if $(VIDEOS),,train)  ## score videos: VIDEOS=folder [AGAINST=folder]; without, the demo's run against its base, 3 per prompt
ifneq ($(VIDEOS),)
	$(RUN) evaluate "$(VIDEOS)" $(if $(AGAINST),--against "$(AGAINST)") --config $(CONFIG) $(ARGS)
else
	$(RUN) evaluate --config demo --run demo/runs/lgf --against base \
	  --prompt-file stages/demo/prompts.txt --num 3 --out demo/evaluation $(ARGS)
endif

test: install  ## run the default tests: CPU only, offline (PROCESSES=2)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

test-faults: install  ## test the cache under faults: kills, full disks, 3,600 changed stores, races
	$(BIN)/python -m pytest tests/cache_schema/faults --full-faults -q

lint: install  ## check style, formatting and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: install  ## run mypy
	$(BIN)/mypy

check: lint typecheck test  ## lint, typecheck and test

docs: install  ## build the documentation as a site in build/docs; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -b html . build/docs
	@echo "open build/docs/index.html"

bench: install  ## run a benchmark: make bench NAME=stage_one
	@test -n "$(NAME)" || { echo "NAME is not set; it is a script of tests/benchmarks: make bench NAME=stage_one"; exit 2; }
	PYTHONPATH=. $(BIN)/python tests/benchmarks/$(NAME).py $(ARGS)

evidence: install  ## compare training losses on drawn figures, hours; resumable: [SIZE=smoke|default|gpu] [OUT=folder]
	$(BIN)/python -m tests.benchmarks.evidence --size $(or $(SIZE),default) $(if $(OUT),--out "$(OUT)") $(ARGS)

gpu-check: $(if $(BUNDLE),$(GPU_SITE),install)  ## what to check on a GPU: [SIZE=tiny, on a CPU] [PART=step] [MINUTES=9] [BUNDLE=folder]
	$(if $(BUNDLE),PYTHONPATH=$(GPU_SITE) $(PYTHON),$(BIN)/python) -m tests.benchmarks.gpu_check \
	  --size $(or $(SIZE),full) --minutes $(MINUTES) $(if $(PART),--parts $(PART)) $(if $(OUT),--out "$(OUT)")

$(GPU_SITE): $(wildcard $(BUNDLE)/*.whl)
	rm -rf $@
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $@ $(BUNDLE)/*.whl
	@touch $@

gpu-bundle: install  ## wheels that a GPU machine without a network lacks: ARGS="--there packages.txt"
	$(BIN)/python -m tests.benchmarks.gpu_check.bundle $(ARGS)

lock: install  ## regenerate requirements.lock from pyproject.toml (needs uv)
	.ci/lock

clean:  ## remove the environment, the demo and caches; data, checkpoints and runs stay
	rm -rf $(VENV) demo demo-i2v build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
