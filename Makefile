# Every target first installs what it needs into .venv. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip --quiet --disable-pip-version-check

CONFIG ?= configs/cifar10.yaml
GPUS   ?= auto
N      ?=
ARGS   ?=
WORKERS ?= 2
# Threads that spin while they wait slow down everything else on the machine.
export OMP_WAIT_POLICY ?= PASSIVE
# On a CPU: keeps large tensors in the process; otherwise glibc returns their memory and requests it again at every step.
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
, := ,
NEEDS_CKPT = $(if $(CKPT),,$(error CKPT is missing: make $@ CKPT=runs/<name>/checkpoints/last.ckpt))

.DEFAULT_GOAL := help
.PHONY: help install lock demo demo-fast demo-anomaly demo-latent demo-tasks demo-text demo-steering train sample evaluate table-ddim table-samplers table-averages table-steps table-guidance bench bench-start bench-latents bench-processes bench-precision bench-modes test test-further test-slow lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-16s %s\n' "$$name" "$$text"; done

install: $(READY) ## install everything into .venv

$(READY): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; choose one with PYTHON=python3.12"; rm -rf $(VENV); exit 1; }
	$(PIP) install --require-hashes --requirement requirements.lock
	@# Without isolation the build uses the setuptools that the lock pins.
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

lock: $(READY) ## pin what pyproject.toml newly needs in requirements.lock; ARGS=--upgrade renews every version
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml $(ARGS)

demo: $(READY) ## train on embedded digits, sample and score; a new run each time, minutes on a CPU
	@rm -rf runs/demo
	@# One thread: for images this small, more threads gain nothing.
	OMP_NUM_THREADS=1 $(RUN) fit -c configs/digits.yaml --trainer.accelerator cpu --trainer.devices 1 \
		--trainer.default_root_dir runs/demo $(ARGS)

CPU := --trainer.accelerator cpu --trainer.devices 1
FAST := runs/fast
FAST_RUNS := fast-ddgan fast-edm fast-teacher fast-ct fast-cd fast-progressive fast-ect
# What a run prints goes to a file: several of them run at the same time.
FAST_FIT = @mkdir -p $(FAST) && echo "training: $(FAST)/$(@:fast-%=%).log" && \
	OMP_NUM_THREADS=1 $(RUN) fit -c $(1) $(CPU) --trainer.default_root_dir $(FAST)/$(@:fast-%=%) \
	--trainer.enable_progress_bar false --evaluation.every_n_steps null --evaluation.at_start false $(ARGS) \
	> $(FAST)/$(@:fast-%=%).log 2>&1 || { tail -n 20 $(FAST)/$(@:fast-%=%).log; exit 1; }
EDM_DIGITS := $(FAST)/edm/checkpoints/last.ckpt

demo-fast: $(READY) ## few-step models on the digits beside DDIM: a table, a plot, samples; WORKERS=2 runs at a time, half an hour of CPU time
	@rm -rf $(FAST)
	@$(MAKE) --no-print-directory --jobs $(WORKERS) $(FAST_RUNS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fast $(FAST)

.PHONY: $(FAST_RUNS)
fast-ddgan: $(READY)
	$(call FAST_FIT,ddgan_digits)

fast-edm: $(READY)
	$(call FAST_FIT,edm_digits)

fast-teacher: $(READY)
	$(call FAST_FIT,progressive_digits_teacher)

fast-ct: $(READY)
	$(call FAST_FIT,ct_digits)

fast-cd: fast-edm
	$(call FAST_FIT,cd_digits --init_from $(EDM_DIGITS) --model.objective.teacher $(EDM_DIGITS))

fast-ect: fast-edm
	$(call FAST_FIT,ect_digits --init_from $(EDM_DIGITS))

fast-progressive: fast-teacher
	$(call FAST_FIT,progressive_digits --model.objective.teacher $(FAST)/teacher/checkpoints/last.ckpt)

ANOMALY_RUN = runs/anomaly_digits_$(1)
ANOMALY_FIT = OMP_NUM_THREADS=1 $(RUN) fit -c anomaly_digits $(2) $(CPU) --trainer.default_root_dir $(ANOMALY_RUN) $(ARGS)
ANOMALY = OMP_NUM_THREADS=1 $(RUN) $(2) --ckpt_path $(ANOMALY_RUN)/checkpoints/last.ckpt $(CPU)
LAMBDAS := --model.table '[100, 200, 300, 400]'

demo-anomaly: $(READY) ## find defects in embedded digits with simplex and with Gaussian noise; minutes on a CPU
	@rm -rf runs/anomaly_digits_simplex runs/anomaly_digits_gaussian
	$(call ANOMALY_FIT,simplex)
	$(call ANOMALY_FIT,gaussian,--model.noise Gaussian)
	@# Settings are chosen by validation images; the scores are of others.
	for judged in validation test; do \
		$(call ANOMALY,simplex,test) --data.source.judged $$judged $(LAMBDAS) && \
		$(call ANOMALY,gaussian,test) --data.source.judged $$judged $(LAMBDAS) || exit 1; \
	done
	$(call ANOMALY,gaussian,predict) --model.detector.lambda_steps 200
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.anomaly runs/anomaly_digits_simplex runs/anomaly_digits_gaussian

TASK_FIT = OMP_NUM_THREADS=1 $(RUN) fit -c $(1) $(CPU) --trainer.default_root_dir runs/tasks/$(2) $(ARGS)

demo-tasks: $(READY) ## super-resolution, inpainting and editing of embedded digits, scored on held-out ones; minutes on a CPU
	@rm -rf runs/tasks
	$(call TASK_FIT,features/digits,features) --data.source.held_out 397
	$(call TASK_FIT,superresolution_digits,superresolution)
	$(call TASK_FIT,inpainting_digits,inpainting)
	$(call TASK_FIT,digits,digits) --data.source.held_out 397
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tasks runs/tasks

NEEDS_DATA = $(if $(DATA),,$(error DATA is missing: make $@ DATA=folder of colour images; VAL=folder of others, to score reconstructions))
LATENT_FIT = OMP_NUM_THREADS=2 $(RUN) fit -c $(1) --data.source.root $(DATA) $(if $(VAL),--data.source.val_root $(VAL)) $(CPU) $(ARGS)
LATENT_TEST = OMP_NUM_THREADS=2 $(RUN) test --ckpt_path runs/$(1)/checkpoints/last.ckpt $(CPU)

demo-latent: $(READY) ## latent diffusion on 32x32 images of DATA=folder, minutes on two cores; VAL=folder scores on others
	$(NEEDS_DATA)@rm -rf runs/latent_demo_autoencoder runs/latent_demo
	$(call LATENT_FIT,latent_demo_autoencoder)
	$(call LATENT_TEST,latent_demo_autoencoder)
	$(call LATENT_FIT,latent_demo)
	$(call LATENT_TEST,latent_demo)
	@echo "originals beside reconstructions: runs/latent_demo_autoencoder/samples.png; samples: runs/latent_demo/samples.png"
	@echo "scores: results.jsonl in both folders. Both pictures are blurred: minutes of training without a discriminator."

TEXT := runs/text_digits
TEXT_TEST = OMP_NUM_THREADS=1 $(RUN) test -c configs/prompts/digits.yaml --ckpt_path $(TEXT)/checkpoints/last.ckpt $(CPU) \
	--trainer.limit_test_batches 1
# Wordings that training did not see: a row of the picture each.
WORDINGS := "a photo of a %s\n" "this is the digit %s\n" "a handwritten figure %s\n" "this shows a handwritten %s\n" \
	"a bold figure %s\n" "a thin figure %s\n" "an image of a bold %s\n" "an image of a thin %s\n" \
	"this shows a bold %s\n" "this shows a thin %s\n"

demo-text: $(READY) ## text to image on the digits: train, score by guidance scale, draw; five minutes on a CPU
	@rm -rf $(TEXT) runs/digits_features
	OMP_NUM_THREADS=1 $(RUN) fit -c configs/features/digits.yaml $(CPU)
	OMP_NUM_THREADS=1 $(RUN) fit -c configs/text_digits.yaml $(CPU) $(ARGS)
	$(TEXT_TEST)
	$(TEXT_TEST) --data.source.unseen false --trainer.default_root_dir $(TEXT)/seen
	@for wording in $(WORDINGS); do \
		printf "$$wording" zero one two three four five six seven eight nine; done > $(TEXT)/prompts.txt
	OMP_NUM_THREADS=1 $(RUN) predict --ckpt_path $(TEXT)/checkpoints/last.ckpt $(CPU) --prompts_file $(TEXT)/prompts.txt

STEERING := runs/steering
STEERING_FIT = OMP_NUM_THREADS=1 $(RUN) fit -c $(1) $(CPU) --trainer.default_root_dir $(STEERING)/$(2) $(ARGS)
LAST := checkpoints/last.ckpt

demo-steering: $(READY) ## edits of attention and CLIP guidance on digits with captions, tables and pictures; up to half an hour on a CPU
	@rm -rf $(STEERING)
	$(call STEERING_FIT,steering_digits,model)
	$(call STEERING_FIT,features/digits,judge)
	$(call STEERING_FIT,guidance/clip_digits,clip)
	$(call STEERING_FIT,guidance/clip_digits --model.noisy false,clean_clip)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.steering --model $(STEERING)/model/$(LAST) --judge $(STEERING)/judge/$(LAST) \
		--clip $(STEERING)/clip/$(LAST) --clean_clip $(STEERING)/clean_clip/$(LAST) --out $(STEERING)/pictures

train: $(READY) ## train CONFIG=configs/cifar10.yaml on GPUS=auto (0: CPU); further options in ARGS="--key value"
	$(RUN) fit -c $(CONFIG) $(DEVICES) $(ARGS)

sample: $(READY) ## generate N=64 images from CKPT=...
	$(NEEDS_CKPT)$(RUN) predict --ckpt_path $(CKPT) $(DEVICES) $(if $(N),--num_images $(N)) $(ARGS)

TEST = $(NEEDS_CKPT)$(RUN) test --ckpt_path $(CKPT) $(DEVICES) $(if $(N),--evaluation.num_images $(N))

evaluate: $(READY) ## score CKPT=... with N images; the recipe's number by default
	$(TEST) $(ARGS)

table-ddim: $(READY) ## score CKPT=... by number of steps and eta, as in DDIM's table 1
	$(TEST) --evaluation.table DDIMTable $(ARGS)

table-samplers: $(READY) ## score CKPT=... with every sampler by number of network evaluations
	$(TEST) --evaluation.table SamplerTable $(ARGS)

table-averages: $(READY) ## score every average of the weights in CKPT=...
	$(TEST) --evaluation.table AverageTable $(ARGS)

table-steps: $(READY) ## score the snapshots, step_<n>.ckpt, of the run of CKPT=...
	$(TEST) --evaluation.table StepTable $(ARGS)

table-guidance: $(READY) ## score CKPT=..., a guided model, by guidance scale
	$(TEST) --evaluation.table GuidanceTable --evaluation.scores '[FrechetDistance, Agreement, PrecisionRecall]' $(ARGS)

bench: $(READY) ## compare speed with diffusers on this machine; on a GPU ARGS="--device cuda --precision bf16"
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.suite $(ARGS)

bench-start: $(READY) ## how long a start takes: help, and training up to its first step
	$(BIN)/python -m benchmarks.start $(ARGS)

bench-processes: $(READY) ## compare two processes with two threads of one; needs two idle cores
	$(BIN)/python -m benchmarks.processes $(ARGS)

bench-latents: $(READY) ## what the frozen encoder costs in a training step; ARGS="--config ldm_church --device cuda --bf16"
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.latents $(ARGS)

bench-precision: $(READY) ## compare what bf16 learns with what float32 learns, on the digits
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.precision $(ARGS)

bench-modes: $(READY) ## compare a denoising diffusion GAN with a GAN and DDPM on 25 Gaussians: minutes on a CPU
	OMP_NUM_THREADS=1 nice $(BIN)/python -m benchmarks.modes $(ARGS)

PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY) ## run the tests in WORKERS=2 processes; ARGS=--cov measures the coverage of lines
	$(PYTEST) $(ARGS)

test-further: $(READY) ## run further cases of what the tests try
	$(PYTEST) -m further $(ARGS)

test-slow: $(READY) ## run the long tests: kills, fuzzing, soak
	$(PYTEST) -m slow $(ARGS)

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
