from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from benchmarks.timing.workspace import Workspace, last_change
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def workspace(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("work"), tiny_checkpoint)


def test_bundles_of_one_language_precision_share_a_decoder(workspace: Workspace) -> None:
    settings = {"a": ExportSettings(preset="192"), "b": ExportSettings(is_pruned=False, vision_precision="int8")}
    folders = workspace.bundles(settings)
    decoders = {(folder / "language" / "decoder.onnx.data").stat().st_ino for folder in folders.values()}
    assert list(folders) == ["a", "b"]
    assert len(decoders) == 1


def test_bundles_without_a_decoder_share_none(workspace: Workspace) -> None:
    settings = {
        "whole": ExportSettings(preset="192"),
        "bare": ExportSettings(preset="192", language_precision="none"),
        "bare, unpruned": ExportSettings(is_pruned=False, language_precision="none"),
    }
    folders = workspace.bundles(settings)
    assert [(folder / "language").exists() for folder in folders.values()] == [True, False, False]


def test_a_bundle_is_written_once(workspace: Workspace) -> None:
    settings = ExportSettings(preset="192")
    written = (workspace.bundle("a", settings) / "manifest.json").stat().st_mtime_ns
    assert (workspace.bundle("a", settings) / "manifest.json").stat().st_mtime_ns == written


def test_code_deep_in_a_folder_counts_as_changed(tmp_path: Path) -> None:
    for depth, name in enumerate(("a.py", "room/b.py", "room/nook/c.py")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000 + depth))
    assert last_change([tmp_path]) == 1002
