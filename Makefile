# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first. `make bench` measures again
# what docs/benchmarks.md shows, except for the 7 B sizes and for a processor without AVX-512, and wants a machine with
# nothing else to do.
PYTHON ?= python3
VENV ?= .venv
# Named on its own, since without a version pip may choose a build with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
IMAGE ?=
BIN := $(VENV)/bin

.PHONY: demo test lint types layers tests wheel browser bench bench-gpu report tensorrt clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.demo $(if $(IMAGE),--image "$(IMAGE)")

test: lint types layers tests wheel

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

layers: $(VENV)/.installed
	$(BIN)/lint-imports --no-logo

# A wheel made from the sdist, alone with the core dependencies, imports and shows every --help.
wheel: $(VENV)/.installed
	$(BIN)/python -m tests.wheel

# A worker for each core, each with about 2 GiB; the files of tests stay whole, since those of one share what they export.
tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The playground in Chromium, which CONTRIBUTING.md says how to install.
browser: $(VENV)/.installed
	$(BIN)/python -m pytest -m browser tests/runtime/serving/playground

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed.latency --tiles 1 --output benchmarks/results/vision-cpu.json
	$(BIN)/python -m benchmarks.speed.latency --tiles 5 --rounds 3 --output benchmarks/results/vision-5-tiles-cpu.json
	$(BIN)/python -m benchmarks.speed.ttft --output benchmarks/results/ttft-cpu.json
	$(BIN)/python -m benchmarks.speed.prefill --output benchmarks/results/prefill-cpu.json
	$(BIN)/python -m benchmarks.speed.throughput --rounds 3 --output benchmarks/results/throughput-cpu.json
	$(BIN)/python -m benchmarks.speed.prefetch --checkpoint benchmarks/miniature/checkpoint \
		--output benchmarks/results/prefetch-cpu.json
	$(BIN)/python -m benchmarks.serve --images 0 --output benchmarks/results/serve-cpu.json
	$(BIN)/python -m benchmarks.serve --rates --output benchmarks/results/serve-memory-cpu.json
	$(BIN)/python -m benchmarks.accuracy --ablation --output benchmarks/results/accuracy.json
	$(BIN)/python -m benchmarks.accuracy.parity --output benchmarks/results/parity.json
	$(MAKE) report

# Needs a CUDA device, and a torch and an onnxruntime that are built for it: the ones of .installed are for the CPU, so
# give a VENV that has them.
bench-gpu:
	$(BIN)/python -m benchmarks.gpu

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report

# TensorRT for RTX builds engines without a GPU: 100 MB of wheels for Linux on x86-64, under NVIDIA's licence.
$(VENV)/.tensorrt-rtx: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[tensorrt-rtx]"
	touch $@

tensorrt: $(VENV)/.tensorrt-rtx
	$(BIN)/python -m pytest -m "tensorrt and not gpu and not slow"

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
