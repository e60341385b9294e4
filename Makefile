# The same commands for people and for CI. Two environments: .venv (what users have) and .venv-dev (tests).
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3,11),(3,12)))' 2>/dev/null && echo $$p && break; done)
DEV := .venv-dev/bin
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*')

.PHONY: demo test test-whole test-numpy2 test-all lint type bench accuracy test-gpu accuracy-gpu sanitize-gpu lines clean

demo: .venv/ready
	.venv/bin/python scripts/demo.py

test: test-whole test-numpy2

test-whole: .venv-dev/ready
	$(DEV)/python -m pytest -q -m "not aarch64"

# And the kernels of the other architecture: cross-compiled, run under qemu-user.
test-all: test
	$(DEV)/python -m pytest -q -m aarch64 tests/aarch64

# The core again on numpy 2, without transformers and Triton (which needs numpy 1).
test-numpy2: .venv-numpy2/ready
	.venv-numpy2/bin/python -m pytest -q tests/program tests/engine tests/kernels tests/quantization tests/checkpoint tests/runtime

lint: .venv-dev/ready
	$(DEV)/ruff check .
	$(DEV)/python scripts/check_structure.py

type: .venv-dev/ready
	$(DEV)/mypy

bench: .venv-dev/ready
	$(DEV)/python benchmarks/cpu.py

accuracy: .venv-dev/ready
	$(DEV)/python benchmarks/accuracy.py

# On a machine with an NVIDIA GPU, with the Python that has torch, cuda-bindings and NVRTC: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(DEV)/python
test-gpu:
	$(GPU_PYTHON) -m pytest -q -rs tests/gpu

accuracy-gpu:
	$(GPU_PYTHON) benchmarks/accuracy_gpu.py

# Kernels of small engines under compute-sanitizer, a part of the CUDA toolkit.
sanitize-gpu:
	$(GPU_PYTHON) scripts/sanitize_gpu.py build build/sanitize
	compute-sanitizer --tool memcheck --error-exitcode 1 $(GPU_PYTHON) scripts/sanitize_gpu.py run build/sanitize
	compute-sanitizer --tool racecheck --error-exitcode 1 $(GPU_PYTHON) scripts/sanitize_gpu.py run build/sanitize

lines:
	@python3 scripts/check_structure.py --lines

.venv/ready: pyproject.toml $(SOURCES)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed (Triton's Python backend)"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check '.[triton]'
	@touch $@

.venv-dev/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed"; exit 1; }
	$(PYTHON) -m venv .venv-dev
	$(DEV)/pip install -q --disable-pip-version-check -e '.[dev,triton,mpi]'
	@touch $@

.venv-numpy2/ready: pyproject.toml
	$(PYTHON) -m venv .venv-numpy2
	.venv-numpy2/bin/pip install -q --disable-pip-version-check -e '.[test]' 'numpy>=2'
	@touch $@

clean:
	rm -rf .venv .venv-dev .venv-numpy2 .demo build dist
