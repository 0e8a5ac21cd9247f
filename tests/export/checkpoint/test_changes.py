"""Weights that are written or exchanged while an export reads them."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.export import exporter
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def exchange(file: Path) -> None:
    shutil.copy(file, file.with_name("other"))
    file.with_name("other").replace(file)


def shrink(file: Path) -> None:
    # To its header, so that what is mapped already is not touched.
    os.truncate(file, 1000)


def rewrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")


@pytest.mark.parametrize("change", [exchange, shrink, rewrite, os.unlink])
@pytest.mark.parametrize("moment", ["verify_vision", "language_manifest"])
def test_an_export_of_weights_that_change_leaves_nothing_and_says_so(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, moment: str
) -> None:
    function, done = getattr(exporter, moment), []

    def change_first(*arguments: Any) -> Any:
        if not done:
            done.append(change(broken / "model.safetensors"))
        return function(*arguments)

    # Early, when all of the language model is still to be read; and after the last weight was read.
    monkeypatch.setattr(exporter, moment, change_first)
    with pytest.raises(CheckpointError) as caught:
        export_bundle(broken, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert "model.safetensors" in str(caught.value)
    assert "start again when nothing else w" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
