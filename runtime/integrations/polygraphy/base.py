"""The classes of Polygraphy that hivtp extends, and errors on the way there and back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError, HivtpError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BaseCompareFunc",
    "BaseRunner",
    "CompareResult",
    "Encoder",
    "Threshold",
    "polygraphy_errors",
    "quiet_polygraphy",
    "require_polygraphy",
]

try:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.comparator import BaseCompareFunc, CompareResult, Threshold
    from polygraphy.json import Encoder
except ImportError:
    # Every module of hivtp can be imported with its core alone; `require_polygraphy` says what is missing.
    BaseRunner = BaseCompareFunc = CompareResult = Threshold = object
    Encoder = None

# Its streams are new in this version, and the extension of its command reaches into what may change in the next.
VERSION = "0.53"


def require_polygraphy() -> None:
    """Refuse to go on without Polygraphy.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: it is of a version that hivtp does not know.
    """
    try:
        from polygraphy import __version__
    except ImportError as error:
        raise MissingExtraError("polygraphy", "compare") from error
    if not __version__.startswith(f"{VERSION}."):
        raise EngineError(
            f"polygraphy {__version__} is installed, and hivtp works with {VERSION}; install it with: "
            "pip install 'hivtp[compare]'"
        )


@contextlib.contextmanager
def polygraphy_errors() -> Iterator[None]:
    """Turn errors of hivtp into Polygraphy's, which its command reports without a traceback."""
    from polygraphy.logger import G_LOGGER

    try:
        yield
    except HivtpError as error:
        G_LOGGER.critical(str(error))


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Let Polygraphy print nothing, and turn what its runners raise into errors of hivtp.

    Raises:
        EngineError: whatever a runner raised; each engine has exceptions of its own.
    """
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            yield
        except HivtpError:
            raise
        except Exception as error:
            raise EngineError(str(error) or type(error).__name__) from error
