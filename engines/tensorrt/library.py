"""TensorRT or TensorRT for RTX, whose Python interfaces are one; what differs is asked of the module."""

from __future__ import annotations

import functools
import re
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from hivtp_ops.errors import EngineError, MissingExtraError

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Older versions are not tested; plugins by namespace, with functions as the fallback, came before this one.
MIN_TENSORRT = (10, 13)


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        name: "tensorrt", for every GPU; or "tensorrt-rtx", for RTX GPUs.
        version: all of it; a plan runs in the version that built it.
        module: the Python module.
        messages: the errors that it has logged last, oldest first.
        logger: what its objects are made with, one for the whole process as TensorRT wants it.
    """

    name: LibraryName
    version: str
    module: Any
    messages: deque[str]
    logger: Any

    @property
    def builds_without_gpu(self) -> bool:
        """Whether a plan can be built where there is no GPU; such a plan runs on every RTX GPU since Ampere."""
        return hasattr(self.module, "ComputeCapability")

    def failure(self, what: str) -> EngineError:
        """An error that says what failed, and what the library last said about it."""
        said = "; ".join(self.messages) or "it gives no reason"
        self.messages.clear()
        return EngineError(f"{self.name} {self.version} {what}: {said}")


@functools.cache
def load_library(name: LibraryName) -> Library:
    """Import a library.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: there is no such library, it does not load, or it is too old.
    """
    if name not in get_args(LibraryName):
        raise EngineError(f"no TensorRT library is named {name!r}; there are {', '.join(get_args(LibraryName))}")
    try:
        module = import_module(MODULES[name])
    except ModuleNotFoundError as error:
        raise MissingExtraError(MODULES[name], name) from error
    except (ImportError, OSError) as error:
        raise EngineError(f"{name} is installed but does not load: {error}; install it again") from error
    version = module.__version__
    if name == "tensorrt" and tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_TENSORRT:
        minimum = ".".join(map(str, MIN_TENSORRT))
        raise EngineError(f"tensorrt {version} is too old; {minimum} is the oldest: pip install 'hivtp[tensorrt]'")
    messages: deque[str] = deque(maxlen=5)
    return Library(name, version, module, messages, _make_logger(module, messages))


def _make_logger(module: Any, messages: deque[str]) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        """Keeps errors for the exception that follows them, and prints nothing."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                messages.append(message.strip())

    return Logger()
