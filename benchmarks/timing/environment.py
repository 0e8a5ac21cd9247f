"""Where numbers come from: machine, threads, versions and date."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Those that are installed are named.
PACKAGES = (
    "hivtp",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "Pillow",
)
CPU_INFO = Path("/proc/cpuinfo")
# What the speed of matrix products on a CPU depends on most, where it has them.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def environment(num_threads: int) -> dict[str, Any]:
    """This machine and what is installed on it, ready for JSON."""
    flags = _cpu_info("flags", "").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_info("model name", platform.machine()),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "num_cores": os.cpu_count(),
        "num_threads": num_threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_info(key: str, default: str) -> str:
    """What the system says of the first processor; the default where it says nothing."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return default
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == key), default)
