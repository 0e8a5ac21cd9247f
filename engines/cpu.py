"""What this processor does with products of 8 bits."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

from hivtp_ops.errors import EngineWarning

# Instructions of x86 that add such products in 32 bits.
EXACT_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
CPU_INFO = Path("/proc/cpuinfo")


def can_overflow_int8() -> bool:
    """Whether products of uint8 activations and int8 weights can lose accuracy here.

    On x86 without VNNI, ONNX Runtime adds two such products in 16 bits, and what is larger is cut off (its operator
    documentation for MatMulInteger, and the AVX2 and AVX512 kernels of its matrix library). Arm has no such step.
    False where the system does not say what the processor can do, as systems other than Linux.
    """
    if platform.machine() != "x86_64":
        return False
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return flags is not None and not EXACT_FLAGS & set(flags)


def warn_where_int8_overflows(part: str) -> None:
    """Give an EngineWarning where an int8 graph may be less exact than it was where its export checked it.

    Args:
        part: the graph, for people.
    """
    if can_overflow_int8():
        warnings.warn(
            f"this processor has no VNNI, so the int8 products of {part} can overflow and lose accuracy, and are "
            "slower; compare answers with an fp32 export, or take that",
            EngineWarning,
            stacklevel=2,
        )
