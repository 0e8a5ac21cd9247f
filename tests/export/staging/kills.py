"""A script: fake exports that are killed at every step they take, and at random instants; run by test_kills.py."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from hivtp.export.staging import placing
from hivtp.export.staging.destination import check_destination
from hivtp.export.staging.staged import staged
from tests.support.bundles import fake_bundle, mark_of, names_in, write_fake_bundle

CHECKPOINT = Path("/nonexistent")


def export(destination: Path, mark: str) -> None:
    with staged(check_destination(destination, True, CHECKPOINT)) as folder:
        write_fake_bundle(folder, mark)


def killed(destination: Path, mark: str, *, step: int | None = None, after: float = 0.0) -> bool:
    """Export in a child that is killed; whether it was, or had ended before.

    Args:
        destination: of the export.
        mark: of its bundle.
        step: kill it at this use of the file system.
        after: else kill it after this many seconds.
    """
    child = os.fork()
    if child == 0:
        steps = 0

        def count(_event: str, _arguments: object) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

        if step is not None:
            sys.addaudithook(count)
        export(destination, mark)
        os._exit(0)
    if step is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def check(destination: Path, kind: str, mark: str) -> None:
    """Nothing is lost: the destination holds the old bundle or the new one, and the next export leaves one of them."""
    found = mark_of(destination)
    if kind == "new":
        assert found in (None, mark)
        assert found == mark or not destination.exists()
    elif kind == "empty":
        assert found in (None, mark)
    elif kind == "exchanged":
        assert found in ("old", mark)
    else:
        assert found in ("old", mark) or (not destination.exists() and holds_both(destination.parent, mark))
    is_there = found is not None
    check_destination(destination, True, CHECKPOINT)
    if kind == "moved" and not is_there:
        assert mark_of(destination) == mark
    for parent in (destination.parent, destination):
        for leftover in parent.glob(".hivtp-partial-*"):
            # Killed before it held its lock, an export leaves a folder with nothing in it, which could be a live one's.
            assert names_in(leftover) in ([], ["owner.json"])
            assert not (leftover / "owner.json").exists() or not (leftover / "owner.json").read_bytes()
            shutil.rmtree(leftover)
    export(destination, "next")
    assert mark_of(destination) == "next"
    assert names_in(destination.parent) == [destination.name, "bystander"]
    assert (destination.parent / "bystander").read_text() == "precious"


def holds_both(parent: Path, mark: str) -> bool:
    [staging] = [parent / name for name in names_in(parent) if name.startswith(".hivtp-partial-")]
    return (mark_of(staging / "replaced"), mark_of(staging / "bundle")) == ("old", mark)


def prepare(destination: Path, kind: str) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    if kind == "empty":
        destination.mkdir()
    elif kind != "new":
        fake_bundle(destination, "old")


def main(folder: Path, kind: str, how: str) -> None:
    warnings.simplefilter("error")
    # What was written outlives the process that wrote it; a sync is against power cuts, and slow.
    os.fsync = lambda _descriptor: None
    if kind == "moved":
        placing.exchange = lambda _first, _second: False
    (folder / "bystander").write_text("precious")
    destination = folder / "b[1]"
    num_kills = 0
    if how == "steps":
        is_killed = True
        while is_killed:
            num_kills += 1
            prepare(destination, kind)
            is_killed = killed(destination, "new", step=num_kills)
            check(destination, kind, "new")
    else:
        prepare(destination, kind)
        started = time.perf_counter()
        export(destination, "new")
        duration = time.perf_counter() - started
        while num_kills < 100:
            prepare(destination, kind)
            num_kills += killed(destination, "new", after=random.uniform(0, 1.2 * duration))
            check(destination, kind, "new")
    sys.stdout.write(f"{num_kills}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
