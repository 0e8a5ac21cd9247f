"""Renames that never replace what they do not know: Linux's renameat2, and what serves elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
# What a kernel or a file system without such a rename answers.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def rename_new(source: Path, target: Path) -> None:
    """Move a file or folder to a place where nothing stands.

    Raises:
        FileExistsError: something stands there; it is untouched.
        OSError: it cannot be moved.
    """
    if _rename(source, target, _NOREPLACE):
        return
    # An empty folder or file of our own takes the place first, and is the only thing that the rename replaces.
    if source.is_dir():
        target.mkdir()
    else:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        source.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.rmdir() if source.is_dir() else target.unlink()
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, so that both places hold one of them at any moment.

    Returns:
        False where the system cannot do that; then nothing has changed.

    Raises:
        OSError: they cannot be swapped.
    """
    return _rename(first, second, _EXCHANGE)


def _rename(source: Path, target: Path, flag: int) -> bool:
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _renameat2() -> Any:
    """The function of the C library; None where it has none."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
