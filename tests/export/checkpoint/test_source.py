"""A checkpoint by its id on the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from benchmarks.published.writer import make_published
from hivtp import LanguageOptions, Pipeline, Request, SamplingParams
from hivtp.engines.bundle import Bundle
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.main import main
from hivtp_ops.errors import CheckpointError, HubError
from tests.support.folders import edit_json
from tests.support.hub import COMMIT, FakeHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "llava-hf/llava-1.5-7b-hf"
NEEDED = {
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
OTHERS = (
    "pytorch_model.bin",
    "model.gguf",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "README.md",
    "x.json",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_published(tmp_path_factory.mktemp("published") / "checkpoint", NAME)
    for name in OTHERS:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({NAME: shutil.copytree(published, tmp_path / "served")}) as served:
        served.use(monkeypatch, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        yield served


def test_what_is_needed_is_downloaded_once_and_nothing_else(
    hub: FakeHub, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(NAME, is_quiet=True)
    shards = {file.name for file in published.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert sorted(hub.sent) == sorted(NEEDED | shards)
    assert (checkpoint.source.name, checkpoint.source.revision) == (NAME, COMMIT)
    assert checkpoint.locations.keys() == Checkpoint.open(published).locations.keys()
    hub.sent.clear()
    assert Checkpoint.open(NAME, "main", is_quiet=True).folder == checkpoint.folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.open(NAME, is_quiet=True).folder == checkpoint.folder
    assert hub.sent == []


def test_a_bundle_of_it_says_where_it_is_from(hub: FakeHub, published: Path, tmp_path: Path, photo: Path) -> None:
    settings = ExportSettings(is_pruned=False, revision="main")
    bundle = export_bundle(NAME, tmp_path / "bundle", settings, is_quiet=True)
    assert (bundle.manifest.source.name, bundle.manifest.source.revision) == (NAME, COMMIT)
    of_folder = export_bundle(published, tmp_path / "other", ExportSettings(is_pruned=False), is_quiet=True)
    assert (of_folder.manifest.source.name, of_folder.manifest.source.revision) == ("checkpoint", None)
    # The language backend of the checkpoint takes the id as well, of the commit that was exported.
    sampling = SamplingParams(max_new_tokens=4, temperature=0)
    with Pipeline.load(bundle.folder) as pipeline:
        expected = pipeline.generate(Request("What is red?", [photo], sampling)).token_ids
    hub.sent.clear()
    with Pipeline.load(bundle.folder, language=LanguageOptions("transformers", checkpoint=NAME)) as pipeline:
        assert pipeline.generate(Request("What is red?", [photo], sampling)).token_ids == expected
    assert hub.sent == []


def test_layers_are_ranked_of_it(hub: FakeHub, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", NAME, str(photo), "--criterion", "features", "--quiet", "--revision", "main"]) == 0
    assert "layers" in capsys.readouterr().out
    assert "model.safetensors.index.json" in hub.sent


def test_the_folder_of_the_cache_has_the_name_of_its_repository(hub: FakeHub, tmp_path: Path) -> None:
    folder = Checkpoint.open(NAME, is_quiet=True).folder
    hub.status = 500
    for given in (folder, folder.parent.parent):
        source = Checkpoint.open(given).source
        assert (source.name, source.revision, source.folder) == (NAME, COMMIT, folder)
    settings = ExportSettings(graph="encoder")
    assert export_bundle(folder, tmp_path / "b", settings, is_quiet=True).manifest.source.name == NAME


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model of type 'qwen2_vl'"),
        ({"mm_vision_tower": "openai/clip"}, "--vision-tower FOLDER"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_its_weights_are_downloaded(
    hub: FakeHub, edit: dict, message: str
) -> None:
    edit_json(hub.repositories[NAME] / "config.json", **edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(NAME, is_quiet=True)
    assert not [name for name in hub.sent if "safetensors" in name]


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ("adapter_config.json", "", "llava-hf/llava-1.5-7b-hf holds an adapter"),
        ("", "config.json", "has no config.json; it is not a checkpoint"),
        ("", "*.safetensors*", r"holds GGUF weights|holds weights in the layout of Mistral"),
    ],
)
def test_files_alone_are_enough_to_refuse(hub: FakeHub, added: str, removed: str, message: str) -> None:
    folder = hub.repositories[NAME]
    if added:
        (folder / added).write_text("{}")
    for file in folder.glob(removed) if removed else ():
        if file.name != "consolidated.safetensors":
            file.unlink()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(NAME, is_quiet=True)
    assert not [name for name in hub.sent if name.endswith((".safetensors", ".gguf", ".bin"))]


def test_the_single_file_of_a_repository_with_both_is_taken(hub: FakeHub, tiny_checkpoint: Path) -> None:
    hub.repositories["llava-hf/tiny"] = tiny_checkpoint
    Checkpoint.open("llava-hf/tiny", is_quiet=True)
    assert [name for name in hub.sent if "safetensors" in name] == ["model.safetensors"]


def test_the_command_downloads_a_checkpoint(hub: FakeHub, tmp_path: Path) -> None:
    environment = os.environ | hub.environment(tmp_path / "home")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hivtp.main", "export", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    process = run(NAME, "bundle", "--revision", "main")
    assert process.returncode == 0, process.stderr
    assert f"from {NAME} of the hub, commit {COMMIT[:12]}" in process.stdout
    assert "Fetching" in process.stderr
    assert Bundle.open(tmp_path / "bundle", check_hashes=True).manifest.source.name == NAME
    process = run("llava-hf/absent", "other")
    assert process.returncode == 1
    assert "there is no folder llava-hf/absent, and the repository llava-hf/absent of the hub" in process.stderr
    process = run("bundle/../bundle", "other", "--revision", "main")
    assert process.returncode == 1
    assert "is a path; leave --revision out" in process.stderr
    assert not (tmp_path / "other").exists()


def test_a_revision_of_a_folder_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(HubError, match="is a path; leave --revision out"):
        Checkpoint.open(tiny_checkpoint, "main")
