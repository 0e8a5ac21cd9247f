"""What one request raises, as an error of hivtp: it costs no other request its answer."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hivtp_ops.errors import HivtpError, OutOfMemoryError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | HivtpError:
    """Call a function and return its result, or what it raises as a HivtpError."""
    try:
        with request_errors():
            return function(*args, **kwargs)
    except HivtpError as error:
        return error


@contextlib.contextmanager
def request_errors() -> Iterator[None]:
    """Turn whatever one request makes a library raise into a HivtpError.

    A panic of a library written in Rust counts too, which is no Exception. What ends the program passes through.

    Raises:
        HivtpError: as it is.
        OutOfMemoryError: memory ran out in the block.
        RequestError: anything else was raised.
    """
    try:
        yield
    except (HivtpError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"memory ran out for this request ({_text(error)}); give fewer or smaller images, a shorter prompt, or ask "
            "for fewer requests or tokens at once"
        ) from error
    except BaseException as error:
        raise RequestError(
            f"the request failed: {type(error).__name__}: {_text(error)}; please report this as a bug of hivtp"
        ) from error


def _text(error: BaseException) -> str:
    try:
        return str(error) or "no details"
    except Exception:  # noqa: BLE001  its own method may fail, too
        return "no details"
