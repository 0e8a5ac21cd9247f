"""hivtp as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts")) / "hivtp"


def hivtp(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Any command."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def hivtp_run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """hivtp run."""
    return hivtp("run", *arguments, **environment)


def shell(script: str, *arguments: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """A line of bash with arguments $1, $2, ...; of commands in a pipe the last one that fails counts."""
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        env=os.environ | {"PATH": path},
        check=False,
    )
