"""Files that a stranger may have left, read with bounds; and files that are whole or absent once they are written."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# Far more than any JSON file of a model takes: the largest tokenizers in use have 40 MB.
MAX_JSON_BYTES = 256 * 2**20


def read_regular(file: Path, max_bytes: int) -> bytes:
    """Read a file, if it is one: a pipe would block for ever, and a device never end.

    Raises:
        OSError: it cannot be read, or is not a regular file, or is larger than `max_bytes`.
    """
    # Without waiting: opening a pipe waits for somebody to write to it.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        if found.st_size > max_bytes:
            raise OSError(f"it has {found.st_size} bytes, and {max_bytes} are allowed")
        return stream.read(max_bytes)


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: see `read_regular`.
        ValueError: it is not JSON in UTF-8, or nested too deeply.
    """
    return parse_json(read_regular(file, MAX_JSON_BYTES))


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON in UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees a part of it.

    Raises:
        OSError: it cannot be written; nothing is left behind, and what was there before is untouched.
    """
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # As any new file: mkstemp lets its owner alone read it.
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _umask() -> int:
    # It can be asked for only by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
