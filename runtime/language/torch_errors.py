"""The errors of torch as those of hivtp."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError, MissingExtraError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator


def require_packages(*packages: str, extra: str) -> None:
    """Import optional packages.

    Raises:
        MissingExtraError: one is not installed, and which extra brings it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, extra) from error


@contextlib.contextmanager
def torch_errors(device: object, part: str) -> Iterator[None]:
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
