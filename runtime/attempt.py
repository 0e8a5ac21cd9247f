"""One of several requests: its result, or the error that it alone failed with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hivtp_ops.errors import HivtpError, OutOfMemoryError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | HivtpError:
    """Call a function and return its result, or its exception as a HivtpError.

    Any exception counts, not only ours: whatever one request makes a library raise must not reach another request.
    """
    try:
        return function(*args, **kwargs)
    except HivtpError as error:
        return error
    except MemoryError as error:
        return out_of_memory(error)
    except Exception as error:  # noqa: BLE001  see above
        return unexpected(error)


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
        raise out_of_memory(error) from error


def out_of_memory(error: MemoryError) -> OutOfMemoryError:
    """The error of a request for which memory ran out."""
    found = OutOfMemoryError(
        f"memory ran out for this request ({error or 'no details'}); give fewer or smaller images, a shorter prompt, "
        "or ask for fewer requests or tokens at once"
    )
    found.__cause__ = error
    return found


def unexpected(error: Exception) -> RequestError:
    """The error of a request that made a library raise something that nobody foresaw."""
    found = RequestError(f"the request failed: {type(error).__name__}: {error}; please report this as a bug of hivtp")
    found.__cause__ = error
    return found
