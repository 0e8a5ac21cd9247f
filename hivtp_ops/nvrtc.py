"""Compiles CUDA source where the program runs, without nvcc: NVIDIA's NVRTC library through cuda-bindings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

INSTALL = "pip install cuda-bindings nvidia-cuda-nvrtc"


def compile_kernel(source: str, target: str) -> bytes:
    """Compile CUDA C++ that includes nothing.

    PyTorch for CUDA brings the two packages that this needs. Nothing is kept: it takes a fraction of a second.

    Args:
        source: the program.
        target: `sm_90` for the machine code of one GPU; `compute_80` for PTX, which a driver turns into the
            machine code of that GPU or of a later one.

    Returns:
        A CUBIN for `sm_`, the text of the PTX for `compute_`.

    Raises:
        KernelError: cuda-bindings or NVRTC is not installed, or NVRTC refuses the source or the target.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(f"cuda-bindings, which compiles CUDA kernels, is not installed; {INSTALL}") from error
    try:
        result, program = nvrtc.nvrtcCreateProgram(source.encode(), b"hivtp.cu", 0, [], [])
    except RuntimeError as error:
        # cuda-bindings looks for the library at its first call.
        raise KernelError(f"NVRTC, which compiles CUDA kernels, is not found ({error}); {INSTALL}") from error
    _check(nvrtc, result, target)
    try:
        options = [f"--gpu-architecture={target}".encode(), b"--std=c++17"]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        _check(nvrtc, result, target, log.decode(errors="replace").strip("\0\n "))
        if target.startswith("sm_"):
            return _read(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return _read(nvrtc, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).rstrip(b"\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: Any, get_size: Callable[..., Any], get: Callable[..., Any], program: Any) -> bytes:
    result, num_bytes = get_size(program)
    _check(nvrtc, result, "output")
    content = bytearray(num_bytes)
    (result,) = get(program, content)
    _check(nvrtc, result, "output")
    return bytes(content)


def _check(nvrtc: Any, result: Any, target: str, log: str = "") -> None:
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC cannot compile the kernel for {target}: {result.name}. {log}".rstrip())
