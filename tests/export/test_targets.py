"""One word for where a bundle will run, and what follows from it."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.engines.bundle import Bundle
from hivtp.engines.tensorrt.library import load_library
from hivtp.export import exporter
from hivtp.export.cli.export import make_parser, settings_from
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.targets import TARGETS, settings_for
from hivtp.main import export
from hivtp_ops.errors import SpecError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path


def parsed(*arguments: str) -> ExportSettings:
    return settings_from(make_parser("hivtp export").parse_args(["checkpoint", "bundle", *arguments]))


def picks(settings: ExportSettings) -> tuple[Any, ...]:
    return (
        settings.vision_precision,
        settings.vision_fallback,
        settings.language_precision,
        settings.block_size,
        settings.prefill_precision,
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cpu", ("int8", "fp32", "int4", 128, "w8a8")),
        ("cpu-small", ("int8", "fp32", "int4", 128, None)),
        ("cpu-exact", ("fp32", None, "fp32", None, None)),
        ("cuda", ("fp16", None, "fp16", None, None)),
        ("tensorrt", ("fp16", None, "fp16", None, None)),
    ],
)
def test_what_each_target_picks(target, expected):
    assert picks(parsed("--target", target)) == picks(settings_for(target)) == expected


def test_without_a_target_nothing_changes():
    assert parsed() == ExportSettings()
    assert set(TARGETS) == {"cpu", "cpu-small", "cpu-exact", "cuda", "tensorrt"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--vision-precision", "fp16"], ("fp16", None, "int4", 128, "w8a8")),
        (["--vision-precision", "int8"], ("int8", "fp32", "int4", 128, "w8a8")),
        (["--language-precision", "int8"], ("int8", "fp32", "int8", None, None)),
        (["--language-precision", "w8a8"], ("int8", "fp32", "w8a8", None, None)),
        (["--language-precision", "none"], ("int8", "fp32", "none", None, None)),
        (["--block-size", "32"], ("int8", "fp32", "int4", 32, "w8a8")),
        (["--language-precision", "int8", "--block-size", "64"], ("int8", "fp32", "int8", 64, None)),
        (["--graph", "encoder"], ("int8", "fp32", "fp32", None, None)),
    ],
)
def test_every_option_overrides_the_target(options, expected):
    assert picks(parsed("--target", "cpu", *options)) == expected


def test_other_options_stay_as_they_are_given():
    settings = parsed("--target", "cpu", "--preset", "64", "--overwrite", "--newline", "all")
    assert (settings.preset, settings.overwrite, settings.newline) == ("64", True, "all")


def test_what_cannot_be_is_refused():
    with pytest.raises(SpecError, match="target is 'tpu'; choose one of cpu, cpu-small, cpu-exact, cuda, tensorrt"):
        settings_for("tpu")
    with pytest.raises(SpecError, match="prefill_precision is for a CPU, and language_precision fp16"):
        settings_for("cuda", prefill_precision="w8a8")
    with pytest.raises(SpecError, match="vision_fallback is 'fp12'; choose one of"):
        ExportSettings(vision_fallback="fp12")
    with pytest.raises(SpecError, match="vision_fallback is for precisions that need no calibration images"):
        ExportSettings(vision_fallback="fp8")


def test_the_summary_says_what_was_picked_and_what_other_targets_take(tiny_checkpoint, tmp_path, capsys):
    sizes, printed = {}, {}
    for target in ("cpu", "cpu-small", "cpu-exact", "cuda"):
        folder = tmp_path / target
        assert export([str(tiny_checkpoint), str(folder), "--quiet", "--preset", "192", "--target", target]) == 0
        printed[target] = capsys.readouterr().out
        sizes[target] = sum(record.num_bytes for record in Bundle.open(folder).manifest.files.values()) / 1e6
    vision = Bundle.open(tmp_path / "cpu").manifest.vision.precision
    assert f"target cpu: {vision} vision, int4 decoder in blocks of 128, prompts in w8a8\n" in printed["cpu"]
    assert "target cuda: fp16 vision, fp16 decoder\n" in printed["cuda"]
    for target, text in printed.items():
        [line] = re.findall("other targets would take about: .*", text)
        found = dict(re.findall(r"(cpu[a-z-]*|cuda and tensorrt|cuda|tensorrt) ([\d,]+) MB", line))
        assert target not in found
        for other, size in sizes.items():
            if other != target and other in found:
                # A model this small is half graph, which does not shrink with its weights, and fills its blocks up.
                assert float(found[other]) == pytest.approx(size, abs=2.5)


def test_without_a_target_the_summary_names_none(tiny_checkpoint, tmp_path, capsys):
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), "--quiet", "--graph", "encoder"]) == 0
    assert "other targets" not in capsys.readouterr().out


def test_a_vision_graph_that_its_check_refuses_is_written_in_the_fallback(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    real = exporter.verify_vision

    def refuse(checkpoint: Any, spec: Any, file: Path, precision: str, kind: str) -> dict[str, Any]:
        if precision == "int8":
            raise VerificationError("kept tokens agree to 70 %")
        return real(checkpoint, spec, file, precision, kind)

    monkeypatch.setattr(exporter, "verify_vision", refuse)
    options = ["--target", "cpu", "--graph", "encoder", "--quiet"]
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 0
    assert "instead of int8, which its check refused" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "bundle", check_hashes=True)
    assert bundle.manifest.vision.precision == "fp32"
    assert bundle.manifest.verification["vision"]["refused"] == "int8: kept tokens agree to 70 %"
    with pytest.raises(VerificationError, match="agree to 70 %"):
        export_bundle(
            tiny_checkpoint, tmp_path / "other", ExportSettings(graph="encoder", vision_precision="int8"), is_quiet=True
        )


def test_the_target_tensorrt_asks_for_tensorrt_before_the_work(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    load_library.cache_clear()
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), "--quiet", "--target", "tensorrt"]) != 0
    assert "tensorrt" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
