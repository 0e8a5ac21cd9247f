from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from hivtp import Pipeline, Request, SamplingParams
from hivtp.runtime.hub.bundle import bundle_folder
from hivtp_ops.errors import BundleError, HubError
from tests.support.hub import COMMIT, FakeHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "someone/tiny-bundle"
ASKED = SamplingParams(max_new_tokens=4, temperature=0)


@pytest.fixture
def hub(unpruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = shutil.copytree(unpruned_bundle, tmp_path / "served")
    (folder / "README.md").write_text("about it")
    with FakeHub({NAME: folder}) as served:
        served.use(monkeypatch, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        yield served


def test_a_bundle_of_the_hub_answers_as_its_folder_does(
    hub: FakeHub, unpruned_bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(unpruned_bundle) as pipeline:
        expected = pipeline.generate(Request("What is red?", [photo], ASKED)).token_ids
    with Pipeline.load(NAME, check_hashes=True) as pipeline:
        assert pipeline.generate(Request("What is red?", [photo], ASKED)).token_ids == expected
        assert pipeline.model.bundle.folder.name == COMMIT
    manifest = json.loads((unpruned_bundle / "manifest.json").read_text())
    names = {name.rpartition("/")[2] for name in manifest["files"]}
    # The listed files alone, each once.
    assert set(hub.sent) == names | {"manifest.json"}
    assert hub.sent.count("manifest.json") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Pipeline.load(NAME, revision="main") as pipeline:
        assert pipeline.generate(Request("What is red?", [photo], ASKED)).token_ids == expected


def test_a_folder_of_that_name_comes_first(hub: FakeHub, unpruned_bundle: Path, tmp_path: Path) -> None:
    hub.status = 500
    shutil.copytree(unpruned_bundle, tmp_path / NAME)
    assert bundle_folder(NAME) == tmp_path.__class__(NAME)


def test_a_repository_that_is_no_bundle_is_refused(hub: FakeHub, tiny_checkpoint: Path) -> None:
    hub.repositories["llava-hf/tiny"] = tiny_checkpoint
    with pytest.raises(BundleError, match=r"llava-hf/tiny of the hub has no manifest.json, .*hivtp export"):
        bundle_folder("llava-hf/tiny")
    assert hub.sent == []


def edit_manifest(hub: FakeHub, **values: object) -> None:
    file = hub.repositories[NAME] / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_manifest_that_leads_elsewhere_brings_nothing(hub: FakeHub) -> None:
    record = {"num_bytes": 3, "sha256": "0" * 64}
    edit_manifest(hub, files={"../../../evil": record})
    with pytest.raises(BundleError, match="cannot open the bundle someone/tiny-bundle of the hub"):
        bundle_folder(NAME)
    assert hub.sent == ["manifest.json"]


def test_a_bundle_that_is_not_whole_is_refused_before_the_rest_is_downloaded(hub: FakeHub) -> None:
    (hub.repositories[NAME] / "vision" / "model.onnx.data").unlink()
    with pytest.raises(HubError, match=r"is not whole in the hub: it lacks vision/model.onnx.data"):
        bundle_folder(NAME)
    assert hub.sent == ["manifest.json"]


def test_the_command_runs_a_bundle_of_the_hub(hub: FakeHub, tmp_path: Path, photo: Path) -> None:
    command = [sys.executable, "-m", "hivtp.main", "run", NAME, "What is red?", "--image", str(photo), "--json"]
    environment = os.environ | hub.environment(tmp_path / "home")
    process = subprocess.run(
        [*command, "--max-new-tokens", "3", "--revision", "main"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert len(json.loads(process.stdout)["token_ids"]) == 3
    # The library's own progress bars.
    assert "Fetching" in process.stderr
    process = subprocess.run(
        [*command, "--revision", "v9"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("hivtp run: the repository someone/tiny-bundle of the hub has no")
