"""The timing cache: what TensorRT measured of its kernels, so that the next build need not measure it again."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hivtp.engines.files import write_whole
from hivtp_ops.errors import EngineWarning

if TYPE_CHECKING:
    from hivtp.engines.gpu import Gpu
    from hivtp.engines.tensorrt.library import Library


def default_cache_folder() -> Path:
    """`hivtp/timing` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hivtp" / "timing"


def cache_file(folder: Path, library: Library, gpu: Gpu) -> Path:
    """Where the measurements of one library version on one GPU with one driver lie."""
    parts = (library.name, library.version, gpu.name, "sm{}{}".format(*gpu.compute_capability), gpu.driver)
    return folder / f"{'-'.join(as_file_name(part) for part in parts)}.cache"


def read_cache(file: Path) -> bytes:
    """The cache; empty where there is none or it cannot be read, which only costs time."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        warnings.warn(f"the timing cache {file} cannot be read: {error}", EngineWarning, stacklevel=2)
        return b""


def write_cache(file: Path, content: bytes) -> None:
    """Keep a cache; where that cannot be done, a warning says so and the build goes on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        warnings.warn(
            f"the timing cache {file} cannot be written: {error}; the next build will measure again",
            EngineWarning,
            stacklevel=2,
        )


def as_file_name(text: str) -> str:
    """Text in lower case with a dash for everything that is awkward in a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
