"""What an inference library raises, as errors that say what to do."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import EngineError, HivtpError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def library_errors(
    library: str, doing: str, memory_words: Sequence[str], reason: Callable[[Exception], str] = str
) -> Iterator[None]:
    """Turn what a library raises into errors of hivtp.

    Args:
        library: its name, for the message.
        doing: what failed, for the message.
        memory_words: in lower case, what its errors say where memory ran out.
        reason: what an error says.

    Raises:
        OutOfMemoryError: memory ran out.
        EngineError: any other failure.
    """
    try:
        yield
    except HivtpError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in memory_words):
            raise OutOfMemoryError(
                f"memory ran out while {doing} ({reason(error)}); give fewer or smaller images, or ask for fewer "
                "requests or tokens at once"
            ) from error
        raise EngineError(f"{library} failed while {doing}: {reason(error)}") from error
