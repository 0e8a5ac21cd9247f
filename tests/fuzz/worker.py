"""Runs cases in a process with bounds: on time and memory, and on what it may write and start.

    python -m tests.fuzz.worker FOLDER SEED SECONDS [NUMBER] BUNDLE...

It stops at the first case that breaks a bound or raises anything but a HivtpError; NUMBER repeats one case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

# More than any case needs: a template is stopped before.
SECONDS_PER_CASE = 30
# Of addresses, most of which are libraries and stacks of threads.
MAX_BYTES = 6 * 2**30
SECONDS_PER_TEMPLATE = 0.5

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def watch(folder: Path) -> None:
    """Refuse to write outside a folder, and to start anything but the process that renders templates."""
    folder = folder.resolve()

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & WRITING:
                return
            check_path(event, path)
        elif event in CHANGES:
            paths = [argument for argument in arguments if isinstance(argument, str | bytes | os.PathLike)]
            # The last one is what changes: a link may be made of any file.
            for path in paths if event == "os.rename" else paths[-1:]:
                check_path(event, path, arguments[-1] if event != "os.truncate" else -1)
        elif event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            end(f"{event} {arguments}")
        elif event == "subprocess.Popen":
            command = [os.fspath(part) for part in arguments[1]]
            if not any(str(part).endswith("templating/worker.py") for part in command):
                end(f"{event} {command}")

    def check_path(event: str, path: Any, folder_descriptor: int = -1) -> None:
        start = os.readlink(f"/proc/self/fd/{folder_descriptor}") if folder_descriptor >= 0 else ""
        place = Path(os.path.realpath(os.path.join(start, os.fsdecode(path))))
        if not place.is_relative_to(folder) and place != Path(os.devnull):
            end(f"{event} of {place}")

    def end(what: str) -> None:
        traceback.print_stack()
        print(f"FORBIDDEN: {what}", file=sys.stderr, flush=True)
        os._exit(3)

    sys.addaudithook(check)


def main(folder: Path, seed: int, seconds: float, number: int | None, bundles: list[Path]) -> int:
    """Run cases until time is up; what came of them goes to standard output as JSON."""
    from hivtp.runtime.inputs.templating import renderer
    from tests.fuzz.cases import KINDS, ROUND, Fuzz

    renderer.MAX_SECONDS = SECONDS_PER_TEMPLATE
    warnings.simplefilter("ignore")
    fuzz = Fuzz(bundles, folder)
    # What is imported and started from here on is the doing of a case.
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    watch(folder)
    results: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    ends_at = time.monotonic() + seconds
    for case in itertools.count() if number is None else [number]:
        if number is None and time.monotonic() > ends_at:
            break
        kind = ROUND[case % len(ROUND)]
        faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
        # A crash of the process leaves this as its last word.
        print(f"case {case}: {kind}", file=sys.stderr, flush=True)
        try:
            # A template and an answer may print what they like.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found = fuzz.run(Random(f"{seed} {case}"), kind)
        except Exception:  # noqa: BLE001  whatever it is, it should not be
            traceback.print_exc()
            return 1
        results[kind][found] += 1
        if number is not None:
            print(found, file=sys.stderr)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({kind: dict(counts) for kind, counts in results.items()}))
    return 0


if __name__ == "__main__":
    where, first, length, *rest = sys.argv[1:]
    chosen = int(rest.pop(0)) if rest[0].isdecimal() else None
    sys.exit(main(Path(where), int(first), float(length), chosen, list(map(Path, rest))))
