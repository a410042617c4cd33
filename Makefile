# Everything goes through .venv; `make install` is the step that the other targets share.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# For a CUDA build of torch from another wheel index: make install TORCH_INDEX=<index of the wheels>
TORCH_INDEX ?=
TORCH_PIP := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: install demo test test-full lint clean

install: $(VENV)/.installed

# DeepSpeed ships as source only and needs torch and its build tools before it; its ops are built
# when a run first needs them.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_PIP) torch
	$(BIN)/pip install --quiet --constraint constraints.txt wheel setuptools ninja hatchling editables
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/autotune run --dataset examples/quickstart/data.jsonl

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of tests side by side: half of the time of most is spent in wait for imports and processes.
WORKERS ?= 2
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test: lint
	$(PYTEST)

test-full: install
	$(PYTEST) -m slow

clean:
	rm -rf $(VENV)
