# `make demo` does the main job from nothing; `make test` proves the tree. Both make .venv first.
# Another Python or an environment of your own: make test PYTHON=/path/to/python
VENV   := .venv
PYTHON ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
BASE   ?= python3
OUT    ?= runs/lenet5-digits
BENCH  ?= benchmarks
PIP     = $(PYTHON) -m pip --disable-pip-version-check

.PHONY: demo test lint format build sanitize bench bench-cpu gpu clean

demo: $(VENV)/.demo
	$(PYTHON) -m liveweight prune lenet5-digits --out $(OUT)

test: $(VENV)/.dev build
	$(PYTHON) -m pytest

lint: $(VENV)/.dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(VENV)/.dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Compiles csrc/ into the package folder, incrementally; an editable install picks it up at once.
build:
	$(PYTHON) csrc/build/compile_native.py

# Op tests on kernels with AddressSanitizer and UBSan; other tests: make sanitize TESTS=tests/nn
sanitize: $(VENV)/.dev
	$(PYTHON) csrc/build/sanitize.py $(TESTS)
	$(if $(TESTS),,$(PYTHON) tests/cuda_host/sanitized.py)

bench: $(VENV)/.dev build
	$(PYTHON) -m pytest $(BENCH) -o python_files='bench_*.py' --benchmark-only \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-group-by=group

# The CPU suite: results/cpu gets JSON, a page and plots. Fewer cells: make bench-cpu CPU=--quick
bench-cpu: $(VENV)/.dev build
	PYTHONPATH=benchmarks $(PYTHON) -m cpu $(CPU)

# On a machine with a GPU, with its own python3 and no network: build, tests, benchmarks, results.
gpu: GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m pip install --no-index --no-build-isolation --no-deps -e .
	PYTHONPATH=benchmarks $(GPU_PYTHON) -m gpu --out benchmarks/results/gpu

# torch goes in first, so that the package is built against it instead of a second copy.
$(VENV)/.torch:
	$(BASE) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" "numpy<2.4"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install --quiet -e ".[plots]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) install --quiet -e ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build src/*.egg-info
	find src -name '*.so' -delete
