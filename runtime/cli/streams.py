"""The standard streams of a command, made safe to use: closed ones, full disks, readers that leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from typing_extensions import Buffer


class LenientOutput(io.FileIO):
    """Writes to a descriptor until that fails, and to nowhere from then on.

    Args:
        descriptor: stays open.

    Attributes:
        error: what a write failed with; None so far.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, content: Buffer) -> int:
        """Write; a failure is noted and not raised."""
        if self.error is None:
            try:
                return super().write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes


def open_closed_descriptors() -> None:
    """Lead standard descriptors that the caller closed to nowhere.

    Otherwise the next file that is opened would take the number of one, and what a library prints would go into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def safe_streams(*, is_output_optional: bool) -> Iterator[LenientOutput | None]:
    """Replace the standard streams with ones that a command can use without care.

    Messages never fail: standard error becomes lenient. Text that the terminal does not know is replaced.

    Args:
        is_output_optional: the same for standard output.

    Returns:
        The lenient standard output, if it is one.
    """
    before = (sys.stdin, sys.stdout, sys.stderr)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process runs
    sys.stderr, _ = _lenient(sys.stderr, is_line_wise=True)
    output = None
    if is_output_optional:
        sys.stdout, output = _lenient(sys.stdout, is_line_wise=False)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model may write any character, and a terminal need not know them all; nor need people type UTF-8.
            stream.reconfigure(errors="replace")
    try:
        yield output
    finally:
        for lenient in (sys.stdout, sys.stderr):
            if lenient is not None:
                with contextlib.suppress(OSError, ValueError):
                    lenient.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _lenient(stream: TextIO | None, *, is_line_wise: bool) -> tuple[TextIO, LenientOutput | None]:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8"), None
    buffer = getattr(stream, "buffer", None)
    # Where Python does not buffer, this is the file itself.
    file = buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(file, io.FileIO):
        # Somebody took its place, such as a test.
        return stream, None
    with contextlib.suppress(OSError):
        stream.flush()
    output = LenientOutput(stream.fileno())
    is_line_wise = is_line_wise or output.isatty() or file is buffer
    return io.TextIOWrapper(io.BufferedWriter(output), stream.encoding, line_buffering=is_line_wise), output
