"""What hivtp-export prints: the steps while it runs, and the summary at its end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from hivtp.export.cli.export import main

if TYPE_CHECKING:
    from pathlib import Path


def test_the_summary_says_what_was_written_and_how_close_it_is(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_checkpoint), str(tmp_path / "bundle"), "--preset", "192"]) == 0
    printed, progress = capsys.readouterr()
    for part in ("wrote", "MB", "relative error", "kept-token agreement 100.0%", "21 of 64 per image", "layers 2 to 2"):
        assert part in printed
    assert "[7/7] Manifest and hashes: done" in progress


def test_the_summary_says_where_layers_were_scaled_from_another_tower(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ["--graph", "encoder", "--quiet"]
    hint = "the paper's for a tower of 24 layers, scaled to one of 6; others may see better: rank them with"
    assert main([str(tiny_checkpoint), str(tmp_path / "scaled"), *encoder]) == 0
    assert hint in capsys.readouterr().out
    assert main([str(tiny_checkpoint), str(tmp_path / "chosen"), "--first-layer", "1", *encoder]) == 0
    assert hint not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ([], 7),
        (["--language-precision", "none"], 4),
        (["--graph", "encoder"], 4),
        (["--prefill-precision", "w8a8"], 9),
        (["--decoder-from", "{pruned}"], 5),
    ],
)
def test_every_step_is_counted(
    tiny_checkpoint: Path,
    pruned_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    num_steps: int,
) -> None:
    options = [option.format(pruned=pruned_bundle) for option in options]
    assert main([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 0
    done = re.findall(r"\[(\d+)/(\d+)\] .*: done", capsys.readouterr().err)
    assert done == [(str(step), str(num_steps)) for step in range(1, num_steps + 1)]
