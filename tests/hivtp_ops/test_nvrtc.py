from __future__ import annotations

import sys

import pytest

from hivtp_ops import PRESETS, HivtpError
from hivtp_ops.errors import KernelError
from hivtp_ops.kernel import NAME, hierarchical_prune_kernel
from hivtp_ops.nvrtc import compile_kernel


@pytest.fixture
def nvrtc():
    """NVRTC needs no GPU, but two packages that come with PyTorch for CUDA alone."""
    module = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        module.nvrtcVersion()
    except RuntimeError:
        pytest.skip("NVRTC is not installed")
    return module


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_kernel_compiles_to_machine_code(name, target):
    cubin = compile_kernel(hierarchical_prune_kernel((24, 24), PRESETS[name]).source, target)
    assert cubin.startswith(b"\x7fELF")
    assert NAME.encode() in cubin


@pytest.mark.usefixtures("nvrtc")
def test_kernel_compiles_to_ptx_whose_parameters_are_three_pointers():
    ptx = compile_kernel(hierarchical_prune_kernel((24, 24), PRESETS["192"]).source, "compute_80").decode()
    assert ".target sm_80" in ptx
    assert f".visible .entry {NAME}(" in ptx
    assert not ptx.endswith("\0")
    parameters = ptx.partition(f".entry {NAME}(")[2].partition(")")[0]
    assert parameters.count(".param") == parameters.count(".param .u64") == 3


@pytest.mark.usefixtures("nvrtc")
def test_source_that_does_not_compile_is_an_error_with_the_compilers_words():
    with pytest.raises(
        KernelError, match=r'sm_90: NVRTC_ERROR_COMPILATION.*identifier "nothing" is undefined'
    ) as error:
        compile_kernel("__global__ void kernel(int* out) { *out = nothing; }", "sm_90")
    assert "\0" not in str(error.value)


@pytest.mark.usefixtures("nvrtc")
def test_gpu_that_nvrtc_does_not_know_is_an_error_that_names_it():
    with pytest.raises(KernelError, match="sm_42"):
        compile_kernel(hierarchical_prune_kernel((24, 24), PRESETS["192"]).source, "sm_42")


def test_without_cuda_bindings_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        compile_kernel("", "sm_90")
    assert issubclass(KernelError, HivtpError)


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    class NoNvrtc:
        @staticmethod
        def nvrtcCreateProgram(*_arguments):  # noqa: N802  NVIDIA's name
            raise RuntimeError("No such file: libnvrtc.so.13")

    class Bindings:
        nvrtc = NoNvrtc

    monkeypatch.setitem(sys.modules, "cuda", Bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings", Bindings)
    with pytest.raises(KernelError, match=r"libnvrtc.so.13.*pip install cuda-bindings nvidia-cuda-nvrtc"):
        compile_kernel("", "sm_90")
