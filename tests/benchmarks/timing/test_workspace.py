from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.timing import workspace as module
from benchmarks.timing.workspace import Workspace, builds_plans, engines
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


def test_the_engine_of_the_cpu_is_one_that_runs_the_precision(exact_bundle: Path, bf16_bundle: Path) -> None:
    assert engines(exact_bundle, "cpu") == ["onnxruntime"]
    assert engines(bf16_bundle, "cpu") == ["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_engines_that_cannot_run_here_are_named_with_their_reason(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace.bundle("a", ExportSettings(preset="192"))
    assert engines(folder, "cuda") == []
    printed = capsys.readouterr().out
    for name in ("torch-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        assert f"{name} is left out for a: " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_fp8_graph_is_for_tensorrt_alone(fp8_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines(fp8_bundle, "cuda") == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tensorrt", "tensorrt-rtx"]


def test_plans_are_built_where_a_library_and_a_gpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, device, expected in (("tensorrt", "cuda", True), ("tensorrt", "cpu", False), ("", "cuda", False)):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, installed=installed: name == installed)
        assert builds_plans(device) == expected
