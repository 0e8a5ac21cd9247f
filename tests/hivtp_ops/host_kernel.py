"""The CUDA kernel on a CPU: its source, unchanged, between a C++ header and a launcher."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hivtp_ops.kernel import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp_ops.kernel import Kernel

HEADER = Path(__file__).with_name("host_cuda.h")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


class HostKernels:
    """Several kernels in one library, since it is the start of the compiler that takes the time.

    Args:
        kernels: the kernels; a run names one by its position.
        folder: where the library is built.
    """

    def __init__(self, kernels: Sequence[Kernel], folder: Path) -> None:
        self.kernels = kernels
        parts = [f'#include "{HEADER}"\n']
        for number, kernel in enumerate(kernels):
            # A namespace does not part two functions that are extern "C", so they get names of their own.
            parts.append(
                f"#define {NAME} {NAME}_{number}\n"
                f"namespace kernel_{number} {{\n{kernel.source}\n"
                f'extern "C" int launch_{number}(const float* importance, long long* indices, long long* counts,'
                " int num_tiles, int num_threads, int is_descending) {\n"
                f"    return host::launch({{{NAME}, importance, indices, counts}},"
                f" num_tiles, num_threads, is_descending);\n}}\n}}\n#undef {NAME}\n"
            )
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text("\n".join(parts), encoding="utf-8")
        command = [COMPILER, "-std=c++17", "-O0", "-shared", "-fPIC", "-o", library, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self._library = ctypes.CDLL(str(library))

    def launch(self, number: int, pointers: Sequence[int], num_tiles: int, is_descending: bool = False) -> None:
        """Run one kernel as a GPU would, but its threads take turns, in one order or in the other."""
        has_ended = getattr(self._library, f"launch_{number}")(
            *map(ctypes.c_void_p, pointers), num_tiles, self.kernels[number].num_threads, int(is_descending)
        )
        assert has_ended, "some threads wait at a barrier to which others never come"

    def run(
        self, number: int, maps: NDArray[np.float32], capacity: int, is_descending: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Run one kernel on maps [tiles, patches]."""
        maps = np.ascontiguousarray(maps, dtype=np.float32)
        # A value that no output has, so that a place which is not written shows.
        indices = np.full((len(maps), capacity), -77, dtype=np.int64)
        counts = np.full(len(maps), -77, dtype=np.int64)
        self.launch(number, [array.ctypes.data for array in (maps, indices, counts)], len(maps), is_descending)
        return indices, counts
