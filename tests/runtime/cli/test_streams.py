from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from hivtp.runtime.cli.streams import LenientOutput, safe_streams


def test_lenient_output_writes_as_any_other():
    reader, writer = os.pipe()
    output = LenientOutput(writer)
    with io.TextIOWrapper(io.BufferedWriter(output), "utf-8") as text:
        text.write("é" * 3)
    assert os.read(reader, 100) == "é".encode() * 3
    assert output.error is None
    # The descriptor is somebody else's.
    assert os.write(writer, b"more") == 4
    os.close(reader)
    os.close(writer)


def test_lenient_output_notes_the_first_failure_and_goes_on():
    reader, writer = os.pipe()
    os.close(reader)
    output = LenientOutput(writer)
    with io.TextIOWrapper(io.BufferedWriter(output), "utf-8") as text:
        for _ in range(3):
            text.write("words" * 10_000)
            text.flush()
    assert output.error is not None
    assert output.error.errno == errno.EPIPE
    os.close(writer)


@pytest.mark.parametrize("is_output_optional", [True, False])
def test_the_streams_are_those_of_before_again(is_output_optional):
    before = (sys.stdin, sys.stdout, sys.stderr)
    with safe_streams(is_output_optional=is_output_optional):
        pass
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_closed_streams_lead_to_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with safe_streams(is_output_optional=True):
        assert sys.stdout.write("words") == 5
        assert sys.stderr.write("words") == 5
        assert sys.stdin.read() == ""
    with safe_streams(is_output_optional=False):
        # A command whose answer is its output must see it.
        assert sys.stdout is None
