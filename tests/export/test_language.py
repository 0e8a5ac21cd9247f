"""A bundle without a decoder: the vision graph, and all that a pipeline needs to answer from the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import Bundle
from hivtp.export import exporter, language
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import DEFAULT_BLOCK_SIZE, DecoderKind
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.main import export as main
from hivtp_ops.errors import BundleError, SpecError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

BARE = ExportSettings(language_precision="none")


def test_without_a_decoder_a_bundle_is_otherwise_the_same(bare_bundle: Path, pruned_bundle: Path) -> None:
    bare, whole = (Bundle.open(folder, check_hashes=True).manifest for folder in (bare_bundle, pruned_bundle))
    assert bare.language == replace(whole.language, decoder=None)
    assert bare.files == {name: file for name, file in whole.files.items() if not name.startswith("language/")}
    assert bare.verification == {"vision": whole.verification["vision"]}
    assert bare.source == replace(whole.source, language_fingerprint=None)
    on_disk = {file.relative_to(bare_bundle).as_posix() for file in bare_bundle.rglob("*") if file.is_file()}
    assert on_disk == bare.files.keys() | {"manifest.json"}
    for part in ("pruning", "vision", "tiling", "family"):
        assert getattr(bare, part) == getattr(whole, part)


def test_of_the_language_model_only_the_newline_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a decoder was exported")

    for name in ("write_embeddings", "write_decoder", "verify_language"):
        monkeypatch.setattr(language, name, fail)
    read = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    # It reads the first values of every weight.
    monkeypatch.setattr(Checkpoint, "fingerprint", "not computed")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", BARE, is_quiet=True)
    assert {name.partition(".")[0] for name in read} == {"vision", "projector", "image_newline"}
    newline = np.load(bundle.folder / bundle.manifest.tiling.newline_file)
    assert (newline == tensor(Checkpoint.open(checkpoint), "image_newline").numpy()).all()


def test_the_vision_graph_is_checked_as_ever(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise VerificationError("too far")

    monkeypatch.setattr(exporter, "verify_vision", fail)
    with pytest.raises(VerificationError, match="too far"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", BARE, is_quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_says_that_there_is_no_decoder_and_how_to_ask(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    assert main([str(tiny_checkpoint), str(folder), "--language-precision", "none"]) == 0
    printed, progress = capsys.readouterr()
    rows = [line.split() for line in printed.splitlines()]
    assert [row[:2] for row in rows if row[:1] in (["vision"], ["language"])] == [
        ["vision", "fp32"],
        ["language", "none"],
    ]
    assert "transformers answers, from the checkpoint" in printed
    assert "hivtp run" in printed
    backend = f"--language-backend transformers --language-checkpoint {tiny_checkpoint}"
    assert f"{folder} --image PHOTO {backend}" in printed
    assert "[5/5] The bundle opened and asked: done" in progress
    assert "ecoder" not in progress


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "64"], "block_size is for a decoder, and language_precision none has none; drop one of"),
        (["--prefill-precision", "w8a8"], "prefill_precision is for a decoder, and language_precision none has none"),
        (["--decoder-from", "other"], "decoder_from is for a decoder, and language_precision none has none; drop one"),
    ],
)
def test_options_of_a_decoder_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(tiny_checkpoint), str(tmp_path / "bundle"), "--language-precision", "none", *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_precision_can_be_asked_for_and_no_other() -> None:
    assert BARE.decoder is None
    assert ExportSettings(graph="encoder").decoder is None
    assert ExportSettings(language_precision="int4").decoder == DecoderKind(
        "int4", DEFAULT_BLOCK_SIZE, rounding="calibrated"
    )
    with pytest.raises(SpecError, match=r"language_precision is None; choose one of fp32, .*, int4-fp16, none"):
        ExportSettings(language_precision=None)


def test_it_gives_no_decoder_to_others(tiny_checkpoint: Path, bare_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no decoder: it was exported with --language-precision none; name one"):
        export_bundle(tiny_checkpoint, tmp_path / "b", ExportSettings(decoder_from=bare_bundle), is_quiet=True)
    assert list(tmp_path.iterdir()) == []
