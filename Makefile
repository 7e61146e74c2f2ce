# make train     sets everything up and trains GPT-2 on this machine
# make test      sets everything up and runs all but the slow tests: under five minutes on two cores
# make extras    installs what compare --serve and evaluate need, too
# make check     style, types, and the few tests that notice most breakage: a minute
# make test-all  every test, the long ones too, with the extras' packages
# make test-gpu  the tests of the kernels, on an NVIDIA GPU
# make mutants   changes the source in one place at a time, and tells which changes no test notices
# make lint      checks style and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
GPU := $(wildcard /proc/driver/nvidia/version /dev/nvidia0)

# Two tests at a time have a core each: more threads of PyTorch's, and processes of tinygrad's that compile, only wait.
# Without SPEC tinygrad does not check each of its own rewrites.
PYTEST := OMP_NUM_THREADS=1 PARALLEL=0 SPEC=0 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Named, because without a path pytest would take ARGS="--arch sm_80" for one, before it knows of --arch
TESTS := data torch_ref tinygrad_impl parity_tests

# Of data, loop, kernels, proof and training step those that notice most in a minute
# (the kernels first: their conftest.py has to come before anything imports Triton)
CHECK := tinygrad_impl/kernels/tests/test_layer_norm.py tinygrad_impl/kernels/tests/test_cross_entropy.py \
  tinygrad_impl/tests/test_trainer.py::test_steps data/runs/tests/test_loop.py \
  data/text/tests/test_shards.py::test_layout_on_disk \
  data/text/tests/test_prepare.py::test_every_document_lands_once_in_order parity_tests/test_mirror.py \
  parity_tests/test_model.py::test_hard_weights

.PHONY: train test extras check check-tests test-all test-gpu mutants lint clean

train: $(VENV)/installed
	@$(BIN)/python -m tinygrad_impl.train $(ARGS)

test: $(VENV)/installed
	@$(PYTEST) -m "not slow" $(ARGS)

extras: $(VENV)/installed-extras

check: $(VENV)/installed
	@$(MAKE) --no-print-directory --jobs 2 --output-sync lint check-tests

check-tests:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=3 -m "not slow" $(CHECK) $(ARGS)

test-all: $(VENV)/installed-extras
	@$(PYTEST) $(ARGS)

test-gpu: $(VENV)/installed
	@$(BIN)/python -m pytest --numprocesses 8 --dist worksteal -m "gpu or kernels" $(TESTS) $(ARGS)

mutants: $(VENV)/installed-mutants
	@$(BIN)/python -m parity_tests.mutation $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without an NVIDIA GPU, PyTorch comes from its index of CPU builds, a tenth the size of the others. Where that index is
# out of reach, pip takes the build that it finds elsewhere.
$(VENV)/installed: .requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; install one and run make PYTHON=python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV): once, a minute or two"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (python3-venv)" >&2; exit 2; }
	@echo "installing PyTorch$(if $(GPU),, for CPUs)"
	@$(if $(GPU),,$(PIP) -qq --retries 1 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
	  $(shell grep '^torch==' .requirements.lock))
	@echo "installing the other packages of .requirements.lock"
	@$(PIP) --quiet --requirement .requirements.lock
	@touch $@

$(VENV)/installed-mutants $(VENV)/installed-extras: $(VENV)/installed-%: $(VENV)/installed .requirements-%.lock
	@echo "installing .requirements-$*.lock: once, a minute or more"
	@$(PIP) --quiet --requirement .requirements-$*.lock
	@touch $@

clean:
	rm -rf $(VENV)
