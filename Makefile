# Every target sets up what it needs: a virtual environment in .venv, and system packages where a
# test needs them (LLVM's lld and tools for the AMD kernels; skipped when already installed).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready

.PHONY: run test test-sim test-gpu lint bench check clean

run: $(STAMP)
	$(PY) -m mixmoe.cli run

test: $(STAMP) $(VENV)/.llvm $(VENV)/triton39/.ready
	$(PY) -m pytest -q -n 2 --dist loadscope
	PYTHONPATH=$(VENV)/triton39 $(PY) -m pytest -q -n 2 tests/test_hopper_decode.py \
	  tests/test_hopper_prefill.py tests/test_hopper_compile.py \
	  -k "not ring and not (work_lists and not compile)"

# The CDNA kernels in the simulator, at length.
test-sim: $(STAMP) $(VENV)/.llvm
	$(PY) -m pytest -q -n 2 -m sim_long tests

# On a machine with a Hopper GPU and its own torch and Triton: no virtual environment.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(PY) -m mixmoe.cli bench

check: $(STAMP)
	$(PY) -m mixmoe.cli check --backend cpu

# torch first and pinned: the CPU build where one is at hand. Triton only cross-compiles here.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q --no-deps triton==3.6.0
	$(VENV)/bin/pip install -q -e '.[dev]'
	touch $@

# ld.lld links FlyDSL's code objects, llvm-mc and llvm-objdump read them.
$(VENV)/.llvm: | $(STAMP)
	command -v ld.lld-22 >/dev/null && command -v llvm-mc-22 >/dev/null || \
	  (apt-get update -q && apt-get install -q -y --no-install-recommends lld-22 llvm-22)
	touch $@

# A second Triton, beside the first: the Hopper kernels must compile with both.
$(VENV)/triton39/.ready: | $(STAMP)
	$(VENV)/bin/pip install -q --no-deps --upgrade --target $(VENV)/triton39 triton==3.9.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
