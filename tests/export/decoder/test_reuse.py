from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.engines.bundle import Bundle
from hivtp.export import exporter
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder import language, reuse
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import BundleError, SpecError


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


def test_files_are_copied_where_links_are_refused(
    tiny_checkpoint: Path, pruned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(reuse.os, "link", refuse)
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
    assert "hivtp-export wrote" in refusal(tiny_checkpoint, tmp_path, ExportSettings(decoder_from=tmp_path / "none"))
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
