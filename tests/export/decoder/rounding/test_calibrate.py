"""A text read layer by layer, and the exports that it rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import Bundle
from hivtp.export import exporter
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import write_decoder
from hivtp.export.decoder.language_layers import LanguageLayers
from hivtp.export.decoder.rounding.calibrate import calibrate
from hivtp.export.decoder.rounding.inputs import LinearInputs
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.language import verify_language
from hivtp.main import export
from hivtp_ops.errors import BundleError, SpecError

if TYPE_CHECKING:
    from pathlib import Path

# Few tokens in a fixed order, so that inputs are correlated, as those of a text are.
SEQUENCES = np.random.default_rng(0).integers(20, size=(16, 64)) * 7
OTHERS = (np.random.default_rng(1).integers(20, size=64) * 7).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    text = {"initializer_range": 0.2, "num_hidden_layers": 2}
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("calibrated") / "checkpoint", text=text))


@pytest.mark.parametrize(("precision", "block_size"), [("int4", 32), ("int4", 64), ("int4-fp16", 32)])
def test_a_decoder_is_nearer_to_the_checkpoint_on_other_text(
    checkpoint: Checkpoint, tmp_path: Path, precision: Any, block_size: int
) -> None:
    calibration = calibrate(checkpoint, SEQUENCES, block_size=block_size, is_smoothed=False)
    assert calibration.smoothing is None
    reports = []
    for name, given in (("plain", None), ("calibrated", calibration)):
        file = write_decoder(checkpoint, tmp_path / name, precision, block_size=block_size, calibration=given)
        reports.append(verify_language(checkpoint, file, precision, token_ids=OTHERS))
    plain, calibrated = reports
    assert calibrated["is_text"]
    assert calibrated["quantization_error"] < 0.7 * plain["quantization_error"]
    assert calibrated["relative_error"] <= calibrated["tolerance"]["relative_error"]


def test_the_head_stays_in_8_bits_and_all_else_is_in_4(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import onnx

    calibration = calibrate(checkpoint, SEQUENCES, block_size=32, is_smoothed=False)
    graph = onnx.load(write_decoder(checkpoint, tmp_path, "int4", calibration=calibration)).graph
    bits = {
        node.name: item.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for item in node.attribute
        if item.name == "bits"
    }
    [head] = [name for name in bits if "lm_head" in name]
    assert bits.pop(head) == 8
    assert set(bits.values()) == {4}
    assert bits.keys() == calibration.weights.keys()


def test_inputs_are_those_of_the_whole_model(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk, which computes pieces of the batch, sees what hooks in transformers' model see."""
    from hivtp.export.decoder.rounding import calibrate as module

    seen: list[torch.Tensor] = []
    original = LinearInputs.take_moments

    def take(self: LinearInputs, name: str) -> list[torch.Tensor]:
        moments = original(self, name)
        if name == "mlp.down_proj":
            seen.append(moments[0].clone())
        return moments

    monkeypatch.setattr(LinearInputs, "take_moments", take)
    monkeypatch.setattr(module, "MAX_POSITIONS", 100)
    calibrate(checkpoint, SEQUENCES, block_size=32, is_smoothed=True)
    model = LlamaForCausalLM(checkpoint.config.text_config).eval()
    model.load_state_dict({name: checkpoint.language_tensor(name) for name in model.state_dict()})
    downs = {str(index): layer.mlp.down_proj for index, layer in enumerate(model.model.layers)}
    with torch.inference_mode(), LinearInputs(downs, has_moments=True) as whole:
        model(torch.from_numpy(SEQUENCES))
        for index, found in enumerate(seen):
            [expected] = original(whole, str(index))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_leaves_memory_when_it_is_done(checkpoint: Checkpoint) -> None:
    layers = LanguageLayers(checkpoint.config.text_config, checkpoint.language_tensor)
    with layers.layer(1) as layer:
        assert not any(item.is_meta for item in layer.parameters())
    assert all(item.is_meta for item in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"language_rounding": "plain"},
            "language_rounding is for decoders in int4, int4-fp16, w8a8, and there is none",
        ),
        (
            {"language_precision": "int8", "language_rounding": "calibrated"},
            "language_rounding is for decoders in int4",
        ),
        ({"language_precision": "fp16", "calibration_text": "a.txt"}, "calibration_text is for decoders in int4"),
        ({"graph": "encoder", "language_rounding": "plain"}, "there is none of these; drop it"),
        (
            {"language_precision": "int4", "language_rounding": "plain", "calibration_text": "a.txt"},
            "calibration_text is for language_rounding calibrated, not plain",
        ),
        (
            {"language_precision": "int4", "decoder_from": "b", "calibration_text": "a.txt"},
            "calibration_text is for a decoder that is written, not for decoder_from",
        ),
        (
            {"language_precision": "int4", "language_rounding": "best"},
            "language_rounding is 'best'; choose one of plain",
        ),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ExportSettings(**options)


def test_the_choice_follows_the_precisions() -> None:
    assert ExportSettings().decoder.rounding is None
    assert ExportSettings(language_precision="int4").decoder.rounding == "calibrated"
    assert ExportSettings(language_precision="int8", prefill_precision="w8a8").decoder.rounding == "calibrated"
    assert ExportSettings(language_precision="w8a8", language_rounding="plain").decoder.rounding == "plain"


def test_a_text_that_cannot_be_read_ends_the_export_at_the_start(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--language-precision", "int4", "--calibration-text", str(tmp_path / "none.txt")]
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 1
    errors = capsys.readouterr().err
    assert f"the calibration text {tmp_path / 'none.txt'} cannot be read: No such file" in errors
    assert "Vision graph" not in errors
    assert list(tmp_path.iterdir()) == []


def test_manifest_and_summary_say_how_decoders_were_rounded(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "letters.txt"
    text.write_text("\n".join(f"Line {index} of a letter to a friend." for index in range(300)), encoding="utf-8")
    options = ["--language-precision", "int4", "--prefill-precision", "w8a8", "--quiet"]
    folder = tmp_path / "bundle"
    assert export([str(tiny_checkpoint), str(folder), *options, "--calibration-text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "rounded by GPTQ on letters.txt" in printed
    assert "smoothed on letters.txt" in printed
    assert "on a text (median token" in printed
    settings = ExportSettings(language_precision="int4", prefill_precision="w8a8", decoder_from=folder)
    again = export_bundle(tiny_checkpoint, tmp_path / "again", settings, is_quiet=True).manifest.verification
    assert again["language"]["rounding"]["method"] == "gptq"
    assert again["prefill"]["rounding"]["method"] == "smoothing"
    assert again["language"]["rounding"]["text"] == "letters.txt"
    assert again["language"]["is_text"]
    plain = ExportSettings(
        language_precision="int4", prefill_precision="w8a8", decoder_from=folder, language_rounding="plain"
    )
    with pytest.raises(BundleError, match=r"is not rounded as asked \(plain\): say --language-rounding calibrated"):
        export_bundle(tiny_checkpoint, tmp_path / "plain", plain, is_quiet=True)


def test_without_a_text_weights_are_rounded_to_the_nearest_and_that_is_said(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter, "calibration_text", lambda *_arguments: None)
    folders = [tmp_path / name for name in ("calibrated", "plain")]
    for folder in folders:
        options = ["--language-precision", "int4", "--language-rounding", folder.name, "--quiet"]
        assert export([str(tiny_checkpoint), str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rounded to the nearest, with no text: the tokenizer cannot read the default one") == 1
    first, second = (Bundle.open(folder).manifest for folder in folders)
    assert first.files == second.files
    assert first.verification["language"]["rounding"]["method"] == "nearest"
