# Everything a newcomer needs; `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native
RUN ?= runs/demo
DATA ?= runs/demo-data
TEST_WORKERS ?= 2
THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow test-slurm dist-check lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: $(NATIVE)  ## make .venv, install the pinned CPU set and compile csrc/ (docs/install.md)

$(INSTALLED): pyproject.toml setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	POET_NATIVE=0 $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints/cpu.txt -e '.[dev,deepspeed]'
	@touch $@

$(NATIVE): $(INSTALLED) $(wildcard csrc/*/* build_support/*.py)
	@echo 'compiling csrc/'; mkdir -p build; $(BIN)/python setup.py -q build_ext --inplace > build/compile.log || { tail build/compile.log; exit 1; }
	@if ls poet_megatron/_poet_cpu.so > /dev/null 2>&1; then touch $@; fi  # else look for a compiler again next time

demo: $(NATIVE)  ## text to tokenizer to a trained, evaluated and exported Llama, in minutes on two cores
	@echo "== 1/4 data: the text that Python ships"
	@$(BIN)/poet-megatron prepare --output $(DATA) --vocab-size 4096
	@echo "== 2/4 pretraining (about two minutes on two cores)"
	@$(BIN)/poet-megatron pretrain --config configs/demo.yaml --data.path $(DATA) --train.run_dir $(RUN)
	@echo "== 3/4 evaluation"
	@$(BIN)/poet-megatron evaluate --run $(RUN)
	@echo "== 4/4 export"
	@$(BIN)/poet-megatron export --run $(RUN)
	@echo
	@echo "data        $(DATA)"
	@echo "metrics     $(RUN)/metrics.jsonl   (curves: $(BIN)/tensorboard --logdir $(RUN)/tensorboard)"
	@echo "checkpoints $(RUN)/checkpoints"
	@echo "model       $(RUN)/export          (a Hugging Face Llama)"

test: $(NATIVE)  ## run the tests (unmarked ones)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(NATIVE)  ## run the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-slurm: $(NATIVE)  ## run the job scripts on a virtual Slurm cluster (as root; installs Debian's Slurm if it is not there)
	sh tests/slurm/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slurm --durations=0 --durations-min=1 tests/slurm $(PYTEST_ARGS)

dist-check: $(NATIVE)  ## build sdist and wheel, and use the wheel in a fresh environment
	$(BIN)/python -m pytest -q -m slow tests/integration/test_distribution.py $(PYTEST_ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(NATIVE)  ## time POET layers against dense ones (minutes; leave the machine alone)
	$(BIN)/python -m benchmarks.layer --output benchmarks/results/layer.json

clean:  ## delete the virtual environment, compiled parts and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache poet_megatron/*.so
