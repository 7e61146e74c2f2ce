# make train   sets everything up and trains GPT-2 on this machine
# make test    sets everything up and runs the test suite
# make lint    the checks of style and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, PyTorch comes from its index of CPU builds, which are a tenth of the size.
# Where that index is out of reach, pip says so and takes the build that it finds elsewhere.
GPU := $(wildcard /proc/driver/nvidia/version /dev/nvidia0)
TORCH_INDEX := $(if $(GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/python -m tinygrad_impl.train $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: .requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; install one and run make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) $(shell grep '^torch==' .requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .requirements.lock
	touch $@

clean:
	rm -rf $(VENV)
