"""Small folders that an export takes for bundles, or does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# As large as a write of several pages, so that a kill can fall between two.
NUM_BYTES = 20_000
FILES = ("vision/model.onnx", "vision/model.onnx.data", "language/decoder.onnx", "processor/tokenizer.json")


def write_fake_bundle(folder: Path, mark: str) -> None:
    """Fill a folder like an export does: files first, the manifest last; each file repeats the mark."""
    for name in FILES:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(mark * NUM_BYTES)
    manifest = {"schema_version": 6, "versions": {"hivtp": "0.1.0"}, "mark": mark}
    manifest["files"] = {name: {"num_bytes": len(mark) * NUM_BYTES, "sha256": ""} for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def fake_bundle(folder: Path, mark: str) -> Path:
    folder.mkdir(parents=True)
    write_fake_bundle(folder, mark)
    return folder


def mark_of(folder: Path) -> str | None:
    """The mark of a whole fake bundle; None where there is no manifest. A bundle that is not whole fails the test."""
    if not (folder / "manifest.json").exists():
        return None
    mark = json.loads((folder / "manifest.json").read_text())["mark"]
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {name for name in found if not name.startswith(".hivtp-partial-")} == {*FILES, "manifest.json"}
    for name in FILES:
        assert (folder / name).read_text() == mark * NUM_BYTES, name
    return mark


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
