# Everything runs in a virtual environment that is made and filled when it is first needed.
#
#   PYTHON     the interpreter that makes it, 3.11 or newer
#   VENV       where it is
#   PIP_ARGS   for pip; --extra-index-url https://download.pytorch.org/whl/cpu gets torch without CUDA on Linux
#   OTHER_TORCH  the torch that `make abi` tests under
#   GPU_STEPS  some of those of .ci/gpu, which does the same where nothing can be installed
#   DEMO_ARGS  for examples/digits.py, such as "--seeds 1 --epochs 2"; BENCH_ARGS for gradstats bench
#   TEST_ARGS  for pytest, such as "-n 0" for one process

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU_STEPS ?= cuda triton memcheck racecheck bench linear
OTHER_TORCH ?= 2.11.0
ABI_VENV ?= .venv-torch-$(OTHER_TORCH)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test gpu cuda-check abi lint bench clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.with-demo  ## Train on overlaid digits; table and pictures in demo-results/ (some minutes)
	$(BIN)/python examples/digits.py $(DEMO_ARGS)

test: $(VENV)/.with-test  ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

gpu: $(VENV)/.with-test  ## Test, sanitize and time on a GPU, with a CUDA torch (PIP_ARGS, constraints.txt)
	PYTHON=$(BIN)/python TEST_ARGS="$(TEST_ARGS)" BENCH_ARGS="$(BENCH_ARGS)" .ci/gpu $(GPU_STEPS)

cuda-check: $(VENV)/.with-test  ## Check what nvcc makes of the CUDA kernels, without a GPU
	$(BIN)/python csrc/check_cuda.py

abi: $(VENV)/.with-torch  ## Test the wheel built with this torch under another one, OTHER_TORCH (downloads it)
	rm -rf build/abi
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/abi .
	test -x $(ABI_VENV)/bin/python || $(PYTHON) -m venv $(ABI_VENV)
	$(ABI_VENV)/bin/python -m pip install $(PIP_ARGS) torch==$(OTHER_TORCH) numpy pytest pytest-timeout hypothesis
	$(ABI_VENV)/bin/python -m pip install --no-deps --force-reinstall build/abi/*.whl
	$(ABI_VENV)/bin/gradstats info
	GRADSTATS_REQUIRE_COMPILED=1 $(ABI_VENV)/bin/pytest tests/test_ops.py tests/test_pairwise.py

lint: $(VENV)/.with-dev  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.with-test  ## Time pairwise beside other ways and what the hardware can do (some minutes)
	$(BIN)/gradstats bench $(BENCH_ARGS)

clean:  ## Remove what was compiled, caches and notes of what is installed; keep the virtual environment and results
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f gradstats/*.so $(VENV)/.with-*
	find gradstats tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove the virtual environment too
	rm -rf $(VENV) .venv-torch-*

# ---- installation ----------------------------------------------------------------------------------------------------
# The hidden files are notes of what is done, so that nothing is installed or compiled twice. The package is installed
# in editable form: changes to Python files act at once, changes to csrc/ compile again.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON: expected 3.11 or newer, got " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and builds happen beside it (no isolation), so that the kernels are compiled against this torch.
$(VENV)/.with-torch: constraints.txt | $(BIN)/python
	$(PIP_INSTALL) torch numpy ninja setuptools wheel
	@touch $@

$(VENV)/.with-demo $(VENV)/.with-test: $(VENV)/.with-%: $(VENV)/.with-torch $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@

$(VENV)/.with-dev: $(VENV)/.with-test
	$(PIP_INSTALL) mypy ruff
	@touch $@
