"""What became of one of several requests: a result, or the error that it alone failed with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hivtp_ops.errors import HivtpError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | HivtpError:
    """Call a function; a HivtpError that it raises is returned, and a MemoryError as an OutOfMemoryError."""
    try:
        with memory_errors():
            return function(*args, **kwargs)
    except HivtpError as error:
        return error


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a MemoryError into an OutOfMemoryError, which says what to do.

    Raises:
        OutOfMemoryError: memory ran out in the block.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"memory ran out for this request ({error or 'no more is known'}); give fewer or smaller images, a "
            "shorter prompt, or ask for fewer requests or tokens at once"
        ) from error
