# Two targets do everything on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
# A file's tests share what is costly to make, so they stay together; the slowest file comes first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test test-fast lint format bench bench-plan gpu-check chaos clean

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/test: .venv/core
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	# DeepSpeed is built here, beside the torch that is here; no other one is fetched for it.
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[megatron,deepspeed]'
	touch $@

quickstart: export CUDA_VISIBLE_DEVICES =  # two CPU processes, the same on every machine
quickstart: .venv/core
	$(BIN)/pretrain data build --input stdlib --out data/stdlib --vocab-size 4096 --held-out 0.02
	$(BIN)/pretrain run quickstart --nproc 2 train.stop_at=150
	$(BIN)/pretrain run quickstart --nproc 2
	$(BIN)/pretrain checkpoint export runs/quickstart runs/quickstart/hf-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/pretrain evaluate runs/quickstart
	$(BIN)/pretrain generate runs/quickstart 'def __init__(self' --max-new-tokens 48
	@echo
	@echo 'TensorBoard log: runs/quickstart/tensorboard   ($(BIN)/tensorboard --logdir runs)'
	@echo 'Try next:'
	@echo '  $(BIN)/pretrain report runs/quickstart                   # curves and config as one HTML page'
	@echo '  $(BIN)/pretrain run quickstart --nproc 2 train.steps=600 # train on from the last checkpoint'
	@echo '  $(BIN)/pretrain run tiny --explain                       # every setting and where it comes from'

test test-fast: export OMP_NUM_THREADS = 1  # several tests at once, many of several processes
test: .venv/test lint
	$(PYTEST)

test-fast: .venv/test
	$(PYTEST) -m 'not slow'

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/test
	$(BIN)/python -m tests.bench

bench-plan: .venv/test  # the planner against published runs
	$(BIN)/python -m tests.bench.bench_plan

gpu-check: .venv/test
	$(BIN)/python -m tests.bench.gpu_check

chaos: .venv/test  # kills a run 500 times and resumes it; about an hour
	$(BIN)/python -m tests.checkpoints.chaos --kills 500

clean:
	rm -rf .venv data runs
