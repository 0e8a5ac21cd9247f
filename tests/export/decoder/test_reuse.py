from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.engines.bundle import Bundle, sha256_of
from hivtp.export import exporter, language
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder import reuse
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import BundleError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_bundle_with_a_reused_decoder_equals_one_exported_whole(
    tiny_checkpoint: Path, pruned_bundle: Path, exact_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    settings = ExportSettings(preset="192", decoder_from=pruned_bundle)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    whole = Bundle.open(exact_bundle, check_hashes=True).manifest
    assert dataclasses.replace(bundle.manifest, verification={}) == dataclasses.replace(whole, verification={})
    assert bundle.manifest.verification["language"] == whole.verification["language"]
    answers = [Pipeline.load(folder).generate("What is it?", [photo]) for folder in (bundle.folder, exact_bundle)]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_decoder_serves_every_checkpoint_with_its_language_model(
    tiny_checkpoint: Path, pruned_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    [bias] = [name for name in weights if name.endswith("multi_modal_projector.linear_1.bias")]
    save_file({**weights, bias: weights[bias] + 1}, tuned / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(tuned).fingerprint != Checkpoint.open(tiny_checkpoint).fingerprint
    settings = ExportSettings(decoder_from=pruned_bundle)
    whole = export_bundle(tuned, tmp_path / "whole", ExportSettings(), is_quiet=True).folder
    reused = export_bundle(tuned, tmp_path / "reused", settings, is_quiet=True).folder
    answers = [Pipeline.load(folder).generate("What is it?", [photo]).token_ids for folder in (whole, reused)]
    assert answers[0] == answers[1]


def test_the_decoder_is_not_written_again(
    tiny_checkpoint: Path, pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise AssertionError("the decoder was exported")

    monkeypatch.setattr(language, "write_decoder", fail)
    settings = ExportSettings(is_pruned=False, decoder_from=pruned_bundle)
    export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True)


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(reuse.os, "link", refuse)


def test_files_are_copied_where_links_are_refused(
    tiny_checkpoint: Path, pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", ExportSettings(decoder_from=pruned_bundle), is_quiet=True)
    Bundle.open(bundle.folder, check_hashes=True)
    assert not (bundle.folder / "language/decoder.onnx").samefile(pruned_bundle / "language/decoder.onnx")


def refusal(checkpoint: Path, folder: Path, settings: ExportSettings) -> str:
    with pytest.raises(BundleError) as caught:
        export_bundle(checkpoint, folder / "bundle", settings, is_quiet=True)
    assert not (folder / "bundle").exists()
    return str(caught.value)


def test_a_decoder_of_another_checkpoint_or_precision_is_refused(
    tiny_checkpoint: Path, pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the vision graph, whose export takes a while.
    monkeypatch.setattr(exporter, "build_vision_graph", None)
    other = make_checkpoint(tmp_path / "other", "tiny", seed=5)
    assert "whose language model is another" in refusal(other, tmp_path, ExportSettings(decoder_from=pruned_bundle))
    settings = ExportSettings(decoder_from=pruned_bundle, language_precision="int4")
    assert "--language-precision fp32" in refusal(tiny_checkpoint, tmp_path, settings)


def test_a_decoder_rounded_in_other_blocks_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = export_bundle(
        tiny_checkpoint, tmp_path / "a", ExportSettings(language_precision="int4", block_size=64), is_quiet=True
    )
    assert coarse.manifest.language.decoder.block_size == 64
    monkeypatch.setattr(exporter, "build_vision_graph", None)
    settings = ExportSettings(decoder_from=coarse.folder, language_precision="int4")
    assert "in blocks of 64, and 32 is asked for; say --block-size 64" in refusal(tiny_checkpoint, tmp_path, settings)


def test_a_decoder_for_prompts_is_taken_over_with_the_other_or_not_at_all(
    tiny_checkpoint: Path, prefill_bundle: Path, pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(decoder_from=prefill_bundle, prefill_precision="w8a8")
    taken = export_bundle(tiny_checkpoint, tmp_path / "taken", settings, is_quiet=True).manifest
    source = Bundle.open(prefill_bundle).manifest
    assert taken.language == source.language
    assert taken.verification["prefill"] == source.verification["prefill"]
    assert "language/prefill.onnx.data" in taken.files
    monkeypatch.setattr(exporter, "build_vision_graph", None)
    without = refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=prefill_bundle))
    assert "a decoder of precision w8a8, and none is asked for; say --prefill-precision w8a8" in without
    settings = ExportSettings(decoder_from=pruned_bundle, prefill_precision="w8a8")
    absent = refusal(tiny_checkpoint, tmp_path, settings)
    assert "a decoder of precision none, and w8a8 is asked for; leave --prefill-precision out" in absent


def test_an_altered_or_missing_source_is_refused(tiny_checkpoint: Path, pruned_bundle: Path, tmp_path: Path) -> None:
    assert "hivtp export wrote" in refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=tmp_path / "none"))
    altered = tmp_path / "altered"
    for file in pruned_bundle.rglob("*"):
        if file.is_file():
            copy = altered / file.relative_to(pruned_bundle)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    manifest = json.loads((altered / "manifest.json").read_text())
    manifest["files"]["language/decoder.onnx"]["sha256"] = "0" * 64
    (altered / "manifest.json").write_text(json.dumps(manifest))
    assert "was altered" in refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=altered))


def test_an_encoder_bundle_takes_and_gives_no_decoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no decoder"):
        ExportSettings(graph="encoder", decoder_from=tmp_path)
    encoder = export_bundle(tiny_checkpoint, tmp_path / "encoder", ExportSettings(graph="encoder"), is_quiet=True)
    assert "encoder bundle" in refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=encoder.folder))


@pytest.fixture
def source(pruned_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be taken from and tampered with."""
    return Path(shutil.copytree(pruned_bundle, tmp_path / "source"))


def tamper(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = source / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_a_decoder_behind_links_is_taken_over_as_files(
    tiny_checkpoint: Path, source: Path, photo: Path, tmp_path: Path
) -> None:
    """As the cache of the Hugging Face hub holds it."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--a--b/blobs"
    shutil.copytree(source, snapshot)
    blobs.mkdir()
    for file in (snapshot / "language").iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../../blobs") / file.name)
    settings = ExportSettings(decoder_from=snapshot)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", settings, is_quiet=True).folder
    taken = sorted((bundle / "language").iterdir())
    assert [file.name for file in taken] == sorted(file.name for file in (source / "language").iterdir())
    for file in taken:
        assert not file.is_symlink()
        assert file.samefile(blobs / file.name)
    # Nothing of where it came from is needed.
    shutil.rmtree(tmp_path / "models--a--b")
    answers = [
        Pipeline.load(folder, check_hashes=True).generate("What is it?", [photo]).token_ids
        for folder in (bundle, source)
    ]
    assert answers[0] == answers[1]


def test_links_are_copied_as_files_where_hard_links_are_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    (source / "language").rename(source / "elsewhere")
    (source / "language").symlink_to("elsewhere", target_is_directory=True)
    (tmp_path / "new").mkdir()
    reuse.take_decoder(Bundle.open(source), tmp_path / "new")
    for file in (source / "elsewhere").iterdir():
        copy = tmp_path / "new/language" / file.name
        assert not copy.is_symlink()
        assert copy.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("links_work", [True, False])
def test_nothing_is_overwritten(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *, links_work: bool
) -> None:
    if not links_work:
        refuse_links(monkeypatch)
    folder = tmp_path / "new"
    (folder / "language").mkdir(parents=True)
    (folder / "language/decoder.onnx").write_text("what stands there")
    with pytest.raises(FileExistsError):
        reuse.take_decoder(Bundle.open(source), folder)
    assert (folder / "language/decoder.onnx").read_text() == "what stands there"


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/tmp/outside.onnx", "language/../../outside.onnx", "vision/../language/decoder.onnx"]
)
def test_a_name_that_leads_out_of_the_bundle_is_refused(
    tiny_checkpoint: Path, source: Path, tmp_path: Path, name: str
) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["language"]["decoder"]["file"] = name
        manifest["files"][name] = manifest["files"].pop("language/decoder.onnx")

    shutil.copy(source / "language/decoder.onnx", tmp_path / "outside.onnx")
    before = (tmp_path / "outside.onnx").read_bytes()
    tamper(source, rename)
    found = refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=source))
    assert "is not a relative path inside the bundle" in found
    assert (tmp_path / "outside.onnx").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["outside.onnx", "source"]


def test_a_file_that_is_listed_and_leads_out_of_the_bundle_is_refused(
    tiny_checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for the bundle")
    (source / "language/extra").symlink_to(secret)
    record = {"num_bytes": secret.stat().st_size, "sha256": sha256_of(secret)}
    tamper(source, lambda manifest: manifest["files"].update({"language/extra": record}))
    found = refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=source))
    assert "language/extra is a link that leads out of the bundle" in found


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "vision/decoder.onnx", "language/other.onnx", "processor/decoder.onnx"]
)
def test_a_decoder_where_no_export_puts_it_is_refused(
    tiny_checkpoint: Path, source: Path, tmp_path: Path, name: str
) -> None:
    def move(manifest: dict[str, Any]) -> None:
        manifest["language"]["decoder"]["file"] = name
        for suffix in ("", ".data"):
            (source / f"language/decoder.onnx{suffix}").rename(source / f"{name}{suffix}")
            manifest["files"][f"{name}{suffix}"] = manifest["files"].pop(f"language/decoder.onnx{suffix}")

    tamper(source, move)
    assert Bundle.open(source, check_hashes=True).manifest.language.decoder.file == name
    found = refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=source))
    assert "keeps its decoder where no export puts it" in found


@pytest.mark.parametrize(
    "verification",
    [
        {},
        {"language": None},
        {"language": {}},
        {"language": {"relative_error": "small", "quantization_error": 0, "argmax_agreement": 1}},
        {"language": {"relative_error": 0, "quantization_error": 0, "argmax_agreement": 1, "tolerance": "wide"}},
    ],
)
def test_a_check_that_was_never_done_is_not_taken_over(
    tiny_checkpoint: Path, source: Path, tmp_path: Path, verification: dict[str, Any]
) -> None:
    tamper(source, lambda manifest: manifest.update(verification=verification))
    found = refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=source))
    assert "does not say how its decoder was checked" in found
