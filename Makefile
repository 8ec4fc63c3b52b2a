# Two commands set up everything on a fresh machine: `make demo` and `make test`.
# Needed beforehand: Python >= 3.11 with venv, gcc/g++ >= 11 or Clang, git, make. CMake and Ninja come as wheels.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
NATIVE_SOURCES := $(shell find runtime/csrc runtime/CMakeLists.txt -type f)

# Through the C interface, with threads, and whole sessions with flipped bytes: what ends within some minutes.
SANITIZED_TESTS := $(addprefix tests/runtime/test_,kernels.py int8.py tiles.py planes.py balance.py malformed.py algebra.py algebra_ops.py)

.PHONY: help demo test test-heal test-browser build lint types format wheel-test test-asan arm64 test-arm64 docs clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): pyproject.toml $(NATIVE_SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -Ccmake.define.SPARSECC_WERROR=ON \
		-Ccmake.define.SPARSECC_EMULATED_AMX=ON
	@touch $@

build: $(STAMP)  ## create the environment and build the operator library

demo: build  ## compress a trained model and print size, speed and accuracy before and after
	$(BIN)/python models/demo.py

test: build  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Beside the environment, not in it: PyTorch is large, and the other tests must pass without it.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_DIR := build/torch

$(TORCH_DIR)/.installed: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --retries 1 --target $(TORCH_DIR) --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	@touch $@

test-heal: build $(TORCH_DIR)/.installed  ## run the tests of healing with a CPU build of PyTorch, kept in build/torch
	PYTHONPATH=$(TORCH_DIR) $(BIN)/python -m pytest -n $(WORKERS) tests/heal tests/passes/test_every_pass.py

# As root on Debian a missing browser is installed; elsewhere the tests say what they miss.
BROWSER := chromium-headless-shell

test-browser: build  ## look at a report in a headless browser
	command -v $(BROWSER) || command -v chromium || command -v google-chrome || [ "$$(id -u)" != 0 ] || \
		{ apt-get -qq update && apt-get -qq install --yes --no-install-recommends $(BROWSER) >/dev/null; } || true
	$(BIN)/python -m pytest tests/report/test_browser.py

lint: build  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build  ## mypy on the package
	$(BIN)/mypy

format: build  ## rewrite the sources in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel-test: build  ## build the wheel and test it installed, away from the checkout; then one built without a compiler
	$(BIN)/python tests/wheel_check.py

test-asan: build  ## kernels, malformed inputs and threads on a library with address and undefined-behaviour sanitizers (GCC)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S runtime -B build/asan -G Ninja -DSPARSECC_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/asan
	SPARSECC_OPS_LIBRARY="$(CURDIR)/build/asan/libsparsecc_ops.so" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(SANITIZED_TESTS)

arm64: build  ## cross-compile the operator library and the runner for 64-bit ARM, into runtime/aarch64-linux
	$(BIN)/python tests/arm64/check.py --build-only

test-arm64: build  ## the same, then kernel tests and whole models on an emulated ARM machine
	$(BIN)/python tests/arm64/check.py

docs: build  ## regenerate the pages made from code
	$(BIN)/python docs/generate.py

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist out runtime/lib runtime/bin runtime/aarch64-linux
