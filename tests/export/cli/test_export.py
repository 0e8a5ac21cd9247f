from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hivtp.export.cli.export import make_parser, settings_from
from hivtp.export.settings import ExportSettings
from hivtp.main import export, main
from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from pathlib import Path


def parse(*arguments: str) -> ExportSettings:
    return settings_from(make_parser("hivtp export").parse_args(["checkpoint", "bundle", *arguments]))


def test_no_option_means_the_defaults() -> None:
    assert parse() == ExportSettings()


def test_options_become_settings(tmp_path: Path) -> None:
    assert parse("--preset", "64", "--overwrite") == ExportSettings(preset="64", overwrite=True)
    assert parse("--no-pruning") == ExportSettings(is_pruned=False)
    assert parse("--keep", "100", "--window", "3") == ExportSettings(spec=PruningSpec(window=3, keep=100))
    own = parse("--first-layer", "5", "--num-layers", "2", "--regions", "4", "--global-ratio", "0.1")
    assert own.spec == PruningSpec(regions=4, global_ratio=0.1)
    assert (own.first_layer, own.num_layers) == (5, 2)
    assert parse("--preset", "64", "--first-layer", "5") == ExportSettings(preset="64", first_layer=5)
    precision = parse("--vision-precision", "int8", "--language-precision", "int4", "--graph", "vision")
    assert (precision.vision_precision, precision.language_precision) == ("int8", "int4")
    assert precision.decoder.block_size == 32
    assert parse("--language-precision", "int8", "--block-size", "128").decoder.block_size == 128
    assert parse().decoder.block_size is None
    assert parse("--prefill-precision", "w8a8").decoder.prefill_precision == "w8a8"
    images = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    calibrated = parse("--vision-precision", "fp8", "--calibration-images", *map(str, images))
    assert calibrated.calibration == tuple(images)
    assert parse("--keep-total", "600", "--newline", "all") == ExportSettings(keep_total=600, newline="all")


@pytest.mark.parametrize("precision", ["bf16", "int4", "FP16", ""])
def test_only_precisions_that_there_are_can_be_asked_for(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--vision-precision", precision)
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "9", "--preset", "192"], "--keep make a rule of your own, which excludes --preset 192"),
        (["--window", "2", "--no-pruning"], "which excludes --no-pruning"),
        (["--global-ratio", "1.5"], "global_ratio must be a number from 0 to 1"),
        (["--global-ratio", "nan"], "global_ratio must be a number from 0 to 1"),
        (["--keep", "0"], "keep must be a whole number of at least 1"),
        (["--graph", "encoder", "--no-pruning"], "encoder graph"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *arguments]) == 1
    _, errors = capsys.readouterr()
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_written_is_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    command = [str(tiny_checkpoint), str(tmp_path / "photos"), "--overwrite"]
    assert export(command) == 1
    assert main(["export", *command]) == 1
    first, second = capsys.readouterr().err.splitlines()
    message = f"{tmp_path / 'photos'} exists and is not a bundle of hivtp; give another destination"
    assert (first, second) == (f"hivtp-export: {message}", f"hivtp export: {message}")


def test_help_explains_presets_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser("hivtp export").parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--preset", "252 to 288 of 576", "--no-pruning", "--vision-precision", "examples:", "--preset 192"):
        assert part in text
    assert "picture" not in text
