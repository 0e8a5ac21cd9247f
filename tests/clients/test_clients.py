"""Real clients against a live server; see run.py."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_clients_that_people_have():
    done = subprocess.run([sys.executable, "-m", "tests.clients.run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
