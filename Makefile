# make demo, make test: the two commands of a newcomer. Each creates $(VENV) and installs what it needs on first use.
#
#   TORCH    requirement of the torch to build and run with, for example TORCH=torch==2.13.0
#   VENV     where the environment lives; PYTHON, what creates it
#   ARGS     passed on, for example make demo ARGS=--quick, make test ARGS="-k gram"

TORCH ?= torch
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Small tensors everywhere: one thread a process is fastest, and makes timings comparable.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-all test-gpu bench-gpu gpu bench bench-each kernels lint format wheel clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(RUN) -m mtlkernels demo $(ARGS)

test: $(VENV)/installed
	$(ONE_THREAD) $(RUN) -m pytest -n auto --maxprocesses 8 $(ARGS)

test-all: $(VENV)/installed
	$(ONE_THREAD) $(RUN) -m pytest -n auto --maxprocesses 8 --slow $(ARGS)

# docs/benchmarks.md and its pictures, build/bench.json: the ops against plain PyTorch and other libraries.
bench: $(VENV)/installed
	$(ONE_THREAD) $(RUN) -m mtlkernels bench $(ARGS)

# Other ops and every weighting, one by one: make bench-each ARGS="-k weights".
bench-each: $(VENV)/installed
	$(ONE_THREAD) $(RUN) -m pytest benchmarks --benchmark-only $(ARGS)

# docs/kernels.md: what the CUDA kernels compile to, move and are bound by. Needs nvcc, no GPU.
kernels: $(VENV)/installed
	$(ONE_THREAD) $(RUN) -m benchmarks.kernels $(ARGS)

# On a machine with a GPU, with $(PYTHON) and what it has: no environment is made and nothing is downloaded. It needs nvcc,
# torch, triton, ninja, setuptools >= 77 and pytest, and runs compute-sanitizer where there is one. Built for the GPU that is there.
test-gpu: gpu
	MTLKERNELS_GPU_TESTS=cuda $(PYTHON) -m pytest tests/gpu $(ARGS)

bench-gpu: gpu
	$(PYTHON) benchmarks/gpu.py $(ARGS)

gpu: FORCE
	TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
	MTLKERNELS_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# From the sdist, so that one which lacks a file is noticed here.
wheel: $(VENV)/torch
	rm -rf build/lib* build/bdist* dist
	$(RUN) setup.py --quiet sdist --dist-dir dist
	$(RUN) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist dist/mtlkernels-*.tar.gz

clean:
	rm -rf $(VENV) build dist *.egg-info mtlkernels/_C*.so mtlkernels/_build.json

# Editable, with the library built beside the sources: the tests and a bare `pytest` import the same files. Built again when
# anything that it is made of changes.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(RUN) -m pip install --no-build-isolation --editable ".[demo,test,lint]"
	touch $@

# torch first, so that the package is built against it and no later step chooses another.
$(VENV)/torch: $(VENV)/requirement
	$(RUN) -m pip install "$(TORCH)" "setuptools>=77" wheel ninja pybind11
	touch $@

# Written when TORCH changes, so that another TORCH is installed into an environment that already exists.
$(VENV)/requirement: FORCE
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
