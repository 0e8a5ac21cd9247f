from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hivtp.export.cli.export import main, make_parser, settings_from
from hivtp.export.settings import ExportSettings
from hivtp_ops import PruningSpec

if TYPE_CHECKING:
    from pathlib import Path


def parse(*arguments: str) -> ExportSettings:
    return settings_from(make_parser().parse_args(["checkpoint", "bundle", *arguments]))


def test_no_option_means_the_defaults() -> None:
    assert parse() == ExportSettings()


def test_options_become_settings() -> None:
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
    assert parse("--vision-precision", "bf16").vision_precision == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "9", "--preset", "192"], "--keep make a rule of your own and cannot go with --preset 192"),
        (["--window", "2", "--no-pruning"], "cannot go with --no-pruning"),
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
    assert main([str(tiny_checkpoint), str(tmp_path / "bundle"), *arguments]) == 1
    _, errors = capsys.readouterr()
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_explains_presets_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--preset", "252 to 288 of 576", "--no-pruning", "--vision-precision", "examples:", "--preset 192"):
        assert part in text
