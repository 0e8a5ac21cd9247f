"""Files from strangers, read with bounds; and files of our own, written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Far more than any JSON file of a model takes: the largest tokenizers in use have 40 MB.
MAX_JSON_BYTES = 256 * 2**20
# Far less than what makes Python run out of stack, here or where a value is printed or copied.
MAX_JSON_DEPTH = 100
# The versions of the .npy format that numpy writes for floats.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
        return stream.read(found.st_size)


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
        ValueError: it is not JSON in UTF-8, is nested too deeply, or holds text that is not valid Unicode.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_json(value)
    return value


def map_array(file: Path, shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Map an array of floats in a .npy file into memory; only what is used is read.

    Raises:
        ValueError: the file is damaged, or holds another array.
    """
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            found, is_fortran, dtype = _HEADERS[version](stream)
            offset = stream.tell()
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise ValueError(f"{file} is not a readable .npy file ({type(error).__name__}: {error})") from error
    # Before anything is computed from the shape.
    if found != shape or not np.issubdtype(dtype, np.floating):
        raise ValueError(
            f"{file} holds {dtype} of shape {list(found)}, the manifest says floats of shape {list(shape)}"
        )
    try:
        return np.memmap(file, dtype, "r", offset, shape, "F" if is_fortran else "C")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated ({error})") from error


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


def _check_json(value: Any) -> None:
    """Refuse what Python's parser takes and most of Python does not: deep nesting, and halves of surrogate pairs.

    Raises:
        ValueError: it was found.
    """
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += [*item, *item.values()]
            elif isinstance(item, list):
                following += item
            elif isinstance(item, str) and not item.isascii():
                item.encode()
        if not following:
            return
        level = following
    raise ValueError("it is nested too deeply")


def _umask() -> int:
    # It can be asked for only by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
