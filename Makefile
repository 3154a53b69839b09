# liveweight: `make demo` runs the main job from nothing, `make test` proves the tree.
PYTHON ?= .venv/bin/python
TORCH ?= torch==2.13.0

.PHONY: build
build:
	$(PYTHON) csrc/build/compile_native.py
