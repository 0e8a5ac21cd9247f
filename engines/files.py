"""Files that are whole or absent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees a part of it.

    Raises:
        OSError: it cannot be written; nothing is left behind, and what was there before is untouched.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
