# What to do with this repository; `make` alone lists it.

PYTHON ?= python3
VENV := .venv/bin
TESTS ?= tests
# One more than the cores of a small machine: tests wait for servers, disks and downloads.
WORKERS ?= 3
# The environment and the processes of test-gpu: engines share the GPU's memory.
GPU_PYTHON ?= $(VENV)/python
GPU_WORKERS ?= 4

# One thread per engine: several engines that spin on a machine of two cores take
# many times as long. No usage statistics and no look-ups on the Hub.
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_OFFLINE := 1
# Container images like to set it. Python would compile all of torch and vLLM anew in every
# process, which doubles the time of each import, 15 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint format docs wheel clean

help:  ## list the targets
	@echo "vllm-qoq: make TARGET"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## create .venv with vLLM, llmcompressor and the tools (once; 3 GB, with a GPU more)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on this machine" >&2; \
		echo "  Fix: install Python 3.10 or newer, or run make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) .ci/setup.py

demo: setup  ## quantize a tiny model twice, merge, measure, serve and ask it something
	@$(VENV)/python examples/demo.py

# ruff and mypy beside the tests: mypy runs for a minute on one core.
test: setup  ## every test that this machine can run, and lint
	@$(MAKE) --no-print-directory lint & lint=$$!; \
	$(VENV)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS); \
	tests=$$?; wait $$lint || { echo "error: make lint failed, see above" >&2; exit 1; }; exit $$tests

test-slow: setup  ## what takes minutes and seldom changes: two ranks of every class of models
	@$(VENV)/python -m pytest -m slow $(TESTS)

test-gpu:  ## every GPU test, and a line in tests/gpu_record.tsv (GPU_PYTHON=, GPU_WORKERS=)
	@$(GPU_PYTHON) tests/gpu_record.py -n $(GPU_WORKERS) --dist worksteal

lint: setup  ## ruff and mypy
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

format: setup  ## apply ruff's formatter and its safe fixes
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

docs: setup  ## build the site of docs/ into site/; a warning is an error
	@$(VENV)/python -m mkdocs build --strict

wheel:  ## build dist/*.whl with kernels for every GPU; needs nvcc, no GPU (19 minutes of CPU, 8 GB)
	@$(PYTHON) .ci/wheel.py

clean:  ## remove what the other targets made, but .venv
	@rm -rf demo-output build dist site *.egg-info .ci/vllm-alias/build .ci/vllm-alias/*.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
