# Every target installs what it needs into .venv at its first call. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

CONFIG ?= configs/cifar10.yaml
GPUS   ?= auto
N      ?=
ARGS   ?=
# Beside other work, threads that spin while they wait cost everyone.
export OMP_WAIT_POLICY ?= PASSIVE
# On a CPU: large tensors stay with the process; otherwise glibc gives them back and fetches them again at each step.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 2147483648
export MALLOC_TOP_PAD_ ?= 268435456

ifeq ($(GPUS),auto)
DEVICES := --trainer.accelerator auto --trainer.devices auto
else ifeq ($(GPUS),0)
DEVICES := --trainer.accelerator cpu --trainer.devices 1
else
DEVICES := --trainer.accelerator gpu --trainer.devices $(GPUS)
endif
ifneq ($(filter-out auto 0 1,$(GPUS)),)
DEVICES += --trainer.strategy ddp
endif

RUN := $(BIN)/python -m diffusion_lit
NEEDS_CKPT = $(if $(CKPT),,$(error CKPT is missing: make $@ CKPT=runs/<name>/checkpoints/last.ckpt))

.DEFAULT_GOAL := help
.PHONY: help install demo train sample evaluate table-ddim table-samplers table-averages table-steps table-guidance bench bench-processes bench-precision test test-slow lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-16s %s\n' "$$name" "$$text"; done

install: $(READY) ## install into .venv

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; choose one with PYTHON=python3.12"; rm -rf $(VENV); exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train on embedded digits, sample and score, anew each time: minutes on a CPU
	@rm -rf runs/demo
	@# One thread: images this small are not worth sharing.
	OMP_NUM_THREADS=1 $(RUN) fit -c configs/base.yaml -c configs/digits.yaml --trainer.accelerator cpu --trainer.devices 1 \
		--trainer.default_root_dir runs/demo $(ARGS)

train: $(READY) ## train CONFIG=configs/cifar10.yaml on GPUS=auto; more options by ARGS="--key value"
	$(RUN) fit -c configs/base.yaml -c $(CONFIG) $(DEVICES) $(ARGS)

sample: $(READY) ## generate N=64 images from CKPT=...
	$(NEEDS_CKPT)$(RUN) predict --ckpt_path $(CKPT) $(DEVICES) $(if $(N),--num_images $(N)) $(ARGS)

evaluate: $(READY) ## score CKPT=... over N images, the recipe's number by default
	$(NEEDS_CKPT)$(RUN) test --ckpt_path $(CKPT) $(DEVICES) $(if $(N),--evaluation.num_images $(N)) $(ARGS)

table-ddim: $(READY) ## score CKPT=... over steps and eta, as DDIM's table 1: a table and a plot
	$(NEEDS_CKPT)$(RUN) table --ckpt_path $(CKPT) $(DEVICES) $(if $(N),--evaluation.num_images $(N)) $(ARGS)

table-samplers: $(READY) ## score CKPT=... by every sampler over network evaluations: a table and a plot
	$(NEEDS_CKPT)$(RUN) table --ckpt_path $(CKPT) $(DEVICES) --table SamplerTable $(if $(N),--evaluation.num_images $(N)) $(ARGS)

table-averages: $(READY) ## score the averages of the weights in CKPT=...
	$(NEEDS_CKPT)$(RUN) table --ckpt_path $(CKPT) $(DEVICES) --table AverageTable $(if $(N),--evaluation.num_images $(N)) $(ARGS)

table-steps: $(READY) ## score the snapshots of the run that CKPT=... is of
	$(NEEDS_CKPT)$(RUN) table --ckpt_path $(CKPT) $(DEVICES) --table StepTable $(if $(N),--evaluation.num_images $(N)) $(ARGS)

table-guidance: $(READY) ## score CKPT=... at several guidance scales: a table and a plot
	$(NEEDS_CKPT)$(BIN)/python -m diffusion_lit.methods.guidance_table $(CKPT) $(if $(N),--num_images $(N)) $(ARGS)

bench: $(READY) ## compare speed with diffusers on this machine; on a GPU ARGS="--device cuda --precision bf16"
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.suite $(ARGS)

bench-processes: $(READY) ## compare two processes with two threads of one; needs two idle cores
	$(BIN)/python -m benchmarks.processes $(ARGS)

bench-precision: $(READY) ## compare what bf16 learns with what float32 learns, on the digits
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.precision $(ARGS)

test: $(READY) ## run the tests
	$(BIN)/pytest $(ARGS)

test-slow: $(READY) ## run the long tests: kills, fuzzing, soak
	$(BIN)/pytest -m slow $(ARGS)

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches, not runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
