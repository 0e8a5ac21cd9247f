"""hivtp as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts")) / "hivtp"


def hivtp(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def hivtp_run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return hivtp("run", *arguments, **environment)
