"""Ctrl-C at every moment of a command: while modules are imported, while the model loads and answers, at the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.command import COMMAND

if TYPE_CHECKING:
    from collections.abc import Sequence

STOPPED = re.compile(r"\nhivtp(-export| \w+): stopped(; .*)?\n")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # Lines as they come, whatever the environment says.
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )


def has_begun(process: subprocess.Popen[str]) -> bool:
    """Whether Python is up, and the command's own code runs: its first modules come from the standard library."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return "_json" in maps or "numpy" in maps or "_struct" in maps


def interrupted(arguments: Sequence[object], seconds: float) -> tuple[int, str]:
    """Exit code and messages of a command that gets Ctrl-C this long after its own code began to run."""
    process = start(*arguments)
    while process.poll() is None and not has_begun(process):
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    "share",
    # Every second moment costs as much again.
    [pytest.param(number / 16, marks=[pytest.mark.slow] if number % 2 else []) for number in range(17)],
)
def test_ctrl_c_ends_a_run_quietly_at_every_moment(pruned_bundle, photo, share):
    arguments = ["run", pruned_bundle, "what", "--image", photo, "--max-new-tokens", 3]
    started = time.perf_counter()
    process = start(*arguments)
    process.communicate(timeout=60)
    code, errors = interrupted(arguments, share * (time.perf_counter() - started))
    # It may come when all is done.
    assert code in (130, 0)
    assert STOPPED.fullmatch(errors) if code == 130 else errors == ""


def test_ctrl_c_while_an_answer_comes_ends_a_run_with_130(endless_bundle):
    process = start("run", endless_bundle, "what", "--max-new-tokens", 60000)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\nhivtp run: stopped\n")


def test_two_signals_at_once_are_as_good_as_one(endless_bundle):
    process = start("run", endless_bundle, "what", "--max-new-tokens", 60000)
    assert process.stdout.read(1)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\nhivtp run: stopped\n")


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0, 4.0])
def test_ctrl_c_ends_an_export_quietly_and_leaves_nothing(tiny_checkpoint, tmp_path, seconds):
    arguments = ["export", tiny_checkpoint, tmp_path / "bundle", "--graph", "encoder", "--quiet"]
    code, errors = interrupted(arguments, seconds)
    assert code in (130, 0)
    assert STOPPED.fullmatch(errors) if code == 130 else errors == ""
    assert [file.name for file in tmp_path.iterdir()] == ([] if code == 130 else ["bundle"])


def test_no_process_is_left_when_a_run_is_killed(endless_bundle):
    process = start("run", endless_bundle, "what", "--max-new-tokens", 60000)
    assert process.stdout.read(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1, "the process that renders the chat template"
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while _is_running(children[0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(children[0])


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
