"""The errors of torch as those of hivtp."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError, MissingExtraError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Every shape is compiled once; by itself torch gives up after 8 of one function.
MAX_SHAPES = 256


def require_packages(*packages: str, extra: str) -> None:
    """Import what runs in torch needs.

    Raises:
        MissingExtraError: one is not installed, and which extra brings it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, extra) from error


@contextlib.contextmanager
def torch_errors(device: object, part: str = "language model") -> Iterator[None]:
    """Turn what torch raises into errors of hivtp.

    Args:
        device: where it runs.
        part: what it runs.

    Raises:
        EngineError: torch failed.
        OutOfMemoryError: the memory of the device ran out.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        # On a CPU it is a plain RuntimeError of the allocator.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise OutOfMemoryError(
                f"the memory of {device} ran out in the {part}: {error}; ask for fewer requests at once, "
                "shorter prompts or fewer images, or for a smaller dtype"
            ) from error
        raise EngineError(f"torch failed in the {part}: {error}") from error


@contextlib.contextmanager
def compiled_runs(device: object, part: str, setting: str) -> Iterator[None]:
    """Let torch compile something for as many shapes as there are, and turn its errors into those of hivtp.

    Args:
        device: where it runs.
        part: what it runs.
        setting: what asked for compiling, for people.

    Raises:
        EngineError: torch failed, or cannot compile here.
        OutOfMemoryError: the memory of the device ran out.
    """
    from torch import _dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    with torch_errors(device, part), _dynamo.config.patch(recompile_limit=MAX_SHAPES):
        try:
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = str(error).strip().partition("\n")[0]
            raise EngineError(
                f"torch cannot compile the {part} for {device}: {reason}; that needs a C++ compiler, and "
                f"Triton on a GPU: install what is missing, or load the pipeline without {setting}"
            ) from error
