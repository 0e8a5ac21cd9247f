"""Long work shows a bar on a terminal and lines in a log, and an export never fails because nobody reads them."""

from __future__ import annotations

import io
import itertools

import pytest

from hivtp.export import progress
from hivtp.export.progress import SECONDS_BETWEEN_LINES, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 10 seconds after the one before."""
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_with_an_estimate_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Progress(num_steps=2)
    with steps.step("Decoder"):
        for done in range(1, 7):
            steps.update(done, 12)
    assert SECONDS_BETWEEN_LINES == 20.0
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] Decoder ...",
        "[1/2] Decoder: 2 of 12, about 100 s left",
        "[1/2] Decoder: 4 of 12, about 80 s left",
        "[1/2] Decoder: 6 of 12, about 60 s left",
        "[1/2] Decoder: done in 70.0 s",
    ]


def test_a_terminal_shows_a_bar_that_goes_when_the_step_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    ticks = itertools.count(step=1.0)
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    steps = Progress(num_steps=3)
    with steps.step("Decoder, int4"):
        for done in range(1, 5):
            steps.update(done, 4)
    with steps.step("Manifest"):
        pass
    text = capsys.readouterr().err
    shown = text.replace("\n", "\r").split("\r")
    assert any("[1/3] Decoder, int4:  50%" in line and "2/4" in line and "left" in line for line in shown)
    # What stays are the lines of what is done.
    lines = [line.split("\r")[-1] for line in text.rstrip("\n").split("\n")]
    assert [line.partition(" in ")[0] for line in lines] == ["[1/3] Decoder, int4: done", "[2/3] Manifest: done"]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr(progress.sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        steps = Progress(num_steps=1, is_quiet=True)
        with steps.step("Decoder"):
            steps.update(1, 2)
    assert capsys.readouterr().err == ""


class Broken(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Broken()])
def test_a_reader_that_left_or_was_never_there_stops_nothing(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys, "stderr", stream)
    steps = Progress(num_steps=1)
    with steps.step("Decoder"):
        steps.update(1, 2)
