from __future__ import annotations

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


@pytest.mark.usefixtures("clock")
def test_a_terminal_shows_every_update_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    steps = Progress(num_steps=1)
    with steps.step("Decoder"):
        steps.update(1, 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "Decoder: 1 of 2, about 10 s left" in text


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Progress(num_steps=1, is_quiet=True)
    with steps.step("Decoder"):
        steps.update(1, 2)
    assert capsys.readouterr().err == ""
