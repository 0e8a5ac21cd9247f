"""The errors of torch as those of hivtp."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def torch_errors(device: object) -> Iterator[None]:
    """Turn what torch raises in the language model into errors of hivtp.

    Args:
        device: where it runs.

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
                f"the memory of {device} ran out in the language model: {error}; ask for fewer requests at once, "
                "shorter prompts or fewer images, or for a smaller dtype"
            ) from error
        raise EngineError(f"torch failed in the language model: {error}") from error
