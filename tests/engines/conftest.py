from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which plans are this machine's own is recorded for the test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pruned_bundle, tmp_path / "bundle")


@pytest.fixture
def edit_manifest(bundle: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Changes the manifest of `bundle` by a function of its JSON."""

    def edit(change: Callable[[dict[str, Any]], object]) -> None:
        file = bundle / "manifest.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return edit


@pytest.fixture
def record_file(bundle: Path, edit_manifest: Callable[..., None]) -> Callable[[str], None]:
    """Enters a file of `bundle` into its manifest, as whoever wrote the bundle would."""
    from hivtp.engines.bundle import sha256_of

    def record(name: str) -> None:
        file = bundle / name
        entry = {"num_bytes": file.stat().st_size, "sha256": sha256_of(file)}
        edit_manifest(lambda manifest: manifest["files"].update({name: entry}))

    return record
