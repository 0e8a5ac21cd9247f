"""What an export leaves behind: a whole bundle that was opened and asked, or nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import Bundle
from hivtp.export import exporter, language
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops import PruningSpec
from hivtp_ops.errors import BundleError, CheckpointError, SpecError, VerificationError
from tests.support.bundles import names_in

if TYPE_CHECKING:
    from pathlib import Path

ENCODER = ExportSettings(graph="encoder")


def test_a_bundle_says_what_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = ExportSettings(preset="192", vision_precision="int8", language_precision="int4")
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    assert names_in(tmp_path) == ["bundle"]
    manifest = Bundle.open(bundle.folder, check_hashes=True).manifest
    assert manifest.family == "llava"
    assert manifest.pruning == PruningSpec.preset("192", (8, 8)).resolve(6)
    assert manifest.vision.grid == (8, 8)
    assert manifest.vision.capacity == 21
    assert (manifest.vision.precision, manifest.language.decoder.precision) == ("int8", "int4")
    assert manifest.language.decoder.block_size == 32
    assert manifest.language.image_token_id == 511
    assert manifest.language.eos_token_ids == (2,)
    assert {"hivtp", "torch", "transformers", "onnxruntime"} <= manifest.versions.keys()
    on_disk = {file.relative_to(bundle.folder).as_posix() for file in bundle.folder.rglob("*") if file.is_file()}
    assert on_disk == manifest.files.keys() | {"manifest.json"}
    assert not [name for name in on_disk if name.endswith((".py", ".pkl", ".bin", ".pt"))]


def test_the_manifest_holds_what_the_checks_found_and_what_was_allowed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = ExportSettings(preset="192", vision_precision="int8", language_precision="int4")
    found = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True).manifest.verification
    for part in ("vision", "language"):
        assert 1e-3 < found[part]["relative_error"] <= found[part]["tolerance"]["relative_error"]
        layers = found[part]["layers"]
        assert layers["errors"].keys() == layers["tolerance"].keys() >= {"operation", "product", "weights"}
        for kind, error in layers["errors"].items():
            assert 0 < error <= layers["tolerance"][kind]
    assert 0 < found["vision"]["median_row_error"] <= found["vision"]["tolerance"]["relative_error"]
    assert 0 < found["vision"]["importance_error"] <= found["vision"]["tolerance"]["importance_error"]
    assert found["language"]["quantization_error"] > found["language"]["relative_error"]


def test_an_encoder_bundle_holds_the_graph_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", ENCODER, is_quiet=True)
    assert bundle.manifest.language is None
    assert bundle.manifest.vision.graph == "encoder"
    assert names_in(bundle.folder) == ["manifest.json", "vision"]


def test_a_vision_export_never_reads_the_language_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    monkeypatch.setattr(Checkpoint, "fingerprint", "not computed")
    export_bundle(tiny_checkpoint, tmp_path / "bundle", ENCODER, is_quiet=True)
    assert read
    assert not [name for name in read if name.startswith("language.")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ExportSettings(spec=PruningSpec(keep=65)), "keep is 65, more than the 64 patches"),
        (ExportSettings(spec=PruningSpec(window=9)), "window is 9, larger than the 8 x 8 grid"),
        (ExportSettings(spec=PruningSpec(first_layer=6, num_layers=3)), "lie outside the encoder"),
    ],
)
def test_a_spec_that_does_not_fit_the_model_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, settings: ExportSettings, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "new" / "bundle", settings, is_quiet=True)
    assert names_in(tmp_path) == []


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(SpecError, match="vision_precision is 'int2'; choose one of fp32, fp16, fp8, int8"):
        ExportSettings(vision_precision="int2")
    with pytest.raises(SpecError, match="block_size is 48; choose one of 16, 32, 64, 128, 256"):
        ExportSettings(language_precision="int4", block_size=48)
    with pytest.raises(
        SpecError, match="those of fp32 are not; drop it, or choose a language_precision of int8 or int4"
    ):
        ExportSettings(block_size=64)
    with pytest.raises(SpecError, match="encoder graph"):
        ExportSettings(graph="encoder", is_pruned=False)


def test_a_failed_verification_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise VerificationError("too far")

    monkeypatch.setattr(language, "verify_language", fail)
    with pytest.raises(VerificationError, match="too far"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert names_in(tmp_path) == []


def test_an_existing_bundle_is_replaced_only_when_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, destination, ENCODER, is_quiet=True)
    with pytest.raises(BundleError, match="--overwrite"):
        export_bundle(tiny_checkpoint, destination, ExportSettings(), is_quiet=True)
    assert Bundle.open(destination).manifest.vision.graph == "encoder"
    export_bundle(tiny_checkpoint, destination, ExportSettings(overwrite=True), is_quiet=True)
    assert Bundle.open(destination).manifest.vision.graph == "vision"
    assert names_in(tmp_path) == ["bundle"]


def test_an_empty_folder_is_filled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    destination.mkdir(mode=0o750)
    before = destination.stat()
    export_bundle(tiny_checkpoint, destination, ENCODER, is_quiet=True)
    Bundle.open(destination, check_hashes=True)
    assert names_in(destination) == ["manifest.json", "vision"]
    assert (destination.stat().st_ino, destination.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_failed_replacement_keeps_the_old_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, destination, ENCODER, is_quiet=True)

    def fill_the_disk(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(language, "write_decoder", fill_the_disk)
    with pytest.raises(BundleError, match=r"the disk is full.*; nothing was written"):
        export_bundle(tiny_checkpoint, destination, ExportSettings(overwrite=True), is_quiet=True)
    assert Bundle.open(destination, check_hashes=True).manifest.vision.graph == "encoder"
    assert names_in(tmp_path) == ["bundle"]


def test_a_bundle_that_cannot_be_used_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = exporter._file_records

    def forget_one(folder: Path) -> dict[str, object]:
        found = records(folder)
        del found["processor/tokenizer.json"]
        return found

    monkeypatch.setattr(exporter, "_file_records", forget_one)
    with pytest.raises(VerificationError, match=r"the bundle cannot be used: .*tokenizer\.json.*; nothing was written"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert names_in(tmp_path) == []


def start_export(checkpoint: Path, destination: Path, max_file_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    command = [sys.executable, "-m", "hivtp.main", "export", str(checkpoint), str(destination)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


@pytest.mark.parametrize("max_file_bytes", [100_000, 60_000])
def test_running_out_of_space_leaves_nothing_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, max_file_bytes: int
) -> None:
    # A limit on the size of a file fails a write as a full disk does.
    process = start_export(tiny_checkpoint, tmp_path / "bundle", max_file_bytes)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the disk is full, or a limit is reached" in errors
    assert "Traceback" not in errors
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("moment", ["Vision graph, fp32 ...", "Decoder, fp32 ...", "The bundle opened and asked ..."])
def test_a_killed_export_leaves_no_bundle_and_the_next_one_succeeds(
    tiny_checkpoint: Path, tmp_path: Path, moment: str
) -> None:
    destination = tmp_path / "bundle"
    process = start_export(tiny_checkpoint, destination)
    for line in process.stderr:
        if moment in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    [leftover] = names_in(tmp_path)
    assert leftover.startswith(".hivtp-partial-")
    export_bundle(tiny_checkpoint, destination, ENCODER, is_quiet=True)
    Bundle.open(destination, check_hashes=True)
    assert names_in(tmp_path) == ["bundle"]


def test_ctrl_c_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = start_export(tiny_checkpoint, tmp_path / "bundle")
    for line in process.stderr:
        if "Vision graph against PyTorch ..." in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "hivtp export: stopped; nothing was written"
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_checkpoint_without_its_processor_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert names_in(tmp_path) == ["checkpoint"]


def test_a_processor_that_does_not_fit_the_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = folder / "preprocessor_config.json"
    original = json.loads(file.read_text())
    file.write_text(json.dumps(original | {"crop_size": {"height": 224, "width": 224}}))
    with pytest.raises(CheckpointError, match="the vision tower takes 64 x 64"):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    file.write_text(json.dumps(original | {"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(CheckpointError, match="supported are CLIPImageProcessor"):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)


def test_an_image_token_of_another_id_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | {"image_token_index": 7}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the id 511, .* image_token_index is 7"):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)


def test_a_checkpoint_without_chat_template_exports(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    bundle = export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert json.loads((bundle.processor_folder / "prompt.json").read_text())["chat_template"] is None


def test_a_shard_that_cannot_be_read_is_not_called_a_full_disk(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = Checkpoint.tensor

    def fail(self: Checkpoint, name: str) -> object:
        if name.startswith("language."):
            raise OSError(5, "Input/output error", str(self.locations[name].file))
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", fail)
    message = r"cannot use .*model\.safetensors: Input/output error; nothing was written"
    with pytest.raises(BundleError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    assert names_in(tmp_path) == []
