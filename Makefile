# From nothing: `make run` (the main job), `make test`. A second call does no set-up.
PY    ?= python3
VENV  ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.6
VISION ?= torchvision==0.28.*
RUN_ARGS ?=
TEST_ARGS ?=
WORKERS ?= 2
BENCH_ARGS ?=
RESULTS ?= runs/gpu-check
ARCH ?= 9.0
COMMIT ?= $(shell git describe --always --dirty 2>/dev/null)

PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.ready-$(or $(GRADREP_BUILD),auto)-$(or $(GRADREP_CUDA),auto)

.PHONY: run test test-quick lint types docs figures bench bench-quick gpu-build gpu-check env clean
.DEFAULT_GOAL := run

# torch before anything that depends on it: a bare requirement would fetch the CUDA build.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(PYTHON) || $(PY) -m venv $(VENV)
	$(PIP) install --upgrade pip setuptools wheel ninja
	$(PIP) install "$(TORCH)"
	rm -f gradrep_kernels/_C*.so  # of another GRADREP_BUILD or GRADREP_CUDA
	$(PIP) install --no-build-isolation -e ".[recipes,test,bench,interop,docs,dev]" "$(TRITON)"
	$(PIP) install --no-deps timm "$(VISION)"  # with dependencies: another torch; VISION is the release for TORCH
	rm -f $(VENV)/.ready-*
	touch $@

run: $(STAMP)
	$(PYTHON) -m gradrep_kernels train $(RUN_ARGS)

# In WORKERS processes (0: in this one) where pytest-xdist is there. A file's tests share what it builds, so a file is
# one process's; the order is that of the folders, in which the longest files do not come last. Each worker computes on
# one thread, but for the tests that set a number; with as many threads as cores in each they would wait for each other.
HAS_XDIST = $(shell $(PYTHON) -c "import xdist; print('yes')" 2>/dev/null)
PARALLEL = $(if $(HAS_XDIST),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
test test-quick: export OMP_NUM_THREADS ?= 1
test test-quick: export PYTHONDONTWRITEBYTECODE :=  # each process that tests start would compile all tests again
test: $(STAMP)
	$(PYTHON) -m pytest $(PARALLEL) $(TEST_ARGS)

# Without the tests marked `slow`: some of every room, in under two minutes.
test-quick: $(STAMP)
	$(PYTHON) -m pytest $(PARALLEL) -m "not slow" $(TEST_ARGS)

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# What users write: the Python of README and docs/, and examples/.
types: $(STAMP)
	rm -rf build/pages && mkdir -p build/pages
	$(PYTHON) tests/support/pages.py build/pages
	$(PYTHON) -m mypy build/pages examples

# docs/ and the docstrings, as pages in site/. A broken link or a missing picture is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

# docs/figures.md and README's figures, from bench/results.
figures: $(STAMP)
	$(PYTHON) bench/ledger.py

# A process for each file: one bench's memory and threads must not meet another's.
BENCHES := rep_sgd_step rep_adamw_step step_tail joint_histogram sgs
bench bench-quick: $(STAMP)
	set -e; for b in $(BENCHES); do $(PYTHON) -m pytest bench/bench_$$b.py $(if $(filter bench-quick,$@),--quick) $(BENCH_ARGS); done

# Both modules and the probe for GPUs of compute capability ARCH, to be carried to a machine that has one. No GPU is
# needed here, and the modules suit any torch from 2.11 on.
gpu-build: export PATH := $(abspath $(VENV))/bin:$(PATH):/usr/local/cuda/bin
gpu-build: $(STAMP)
	GRADREP_BUILD=require GRADREP_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCH)" $(PYTHON) setup.py -q build_ext --inplace
	mkdir -p build
	nvcc -std=c++17 -O3 -arch=sm_$(subst .,,$(ARCH)) -o build/probe bench/probe.cu
	ls -l gradrep_kernels/_C*.so build/probe

# With the machine's own Python: torch, Triton and nvcc are there, and there may be no network.
gpu-check:
	$(PY) bench/gpu_check.py --results "$(RESULTS)" --commit "$(COMMIT)" \
		$(if $(CARRIED),--carried) $(if $(DRY_RUN),--dry-run)

env: $(STAMP)
	$(PYTHON) -m gradrep_kernels env

clean:
	rm -rf $(VENV) build dist site *.egg-info gradrep_kernels/*.so
