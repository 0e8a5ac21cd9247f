"""What hivtp export prints: the steps while it runs, and a table in the end."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest

from hivtp.engines.bundle import Bundle
from hivtp.main import export, main

if TYPE_CHECKING:
    from pathlib import Path


def table(printed: str) -> list[list[str]]:
    """The cells of the table, with its header."""
    lines = printed.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("part "))
    return [re.split(r"\s{2,}", line) for line in lines[start : lines.index("", start)]]


def test_the_summary_is_a_table_of_what_was_written_and_how_close_it_is(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    options = ["--preset", "192", "--language-precision", "int4", "--prefill-precision", "w8a8"]
    assert export([str(tiny_checkpoint), str(folder), *options]) == 0
    printed, progress = capsys.readouterr()
    manifest = Bundle.open(folder).manifest
    assert printed.startswith(f"wrote {folder} from {tiny_checkpoint.name}\n")
    header, vision, language, prefill, processor, everything = table(printed)
    assert header == ["part", "precision", "MB", "error", "allowed"]
    assert [row[0] for row in (vision, language, prefill, processor, everything)] == [
        "vision",
        "language",
        "prefill",
        "processor",
        "all",
    ]
    assert [row[1] for row in (vision, language, prefill)] == ["fp32", "int4", "w8a8"]
    sizes = {name: record.num_bytes for name, record in manifest.files.items()}
    assert everything[1] == f"{sum(sizes.values()) / 1e6:.1f}"
    assert vision[2] == f"{sum(size for name, size in sizes.items() if name.startswith('vision/')) / 1e6:.1f}"
    for row, part in ((vision, "vision"), (language, "language"), (prefill, "prefill")):
        found = manifest.verification[part]
        assert row[3:5] == [f"{found['relative_error']:.1e}", f"{found['tolerance']['relative_error']:.0e}"]
    assert "kept tokens agree to 100.0%" in vision[5]
    assert "rounding costs" in language[5]
    assert "tokens: 21 of 64 per image, scored by layer 2" in printed
    # Columns stand below each other.
    rows = [line for line in printed.splitlines() if line.startswith(("part", "vision", "language", "prefill"))]
    assert len({line.index(cell) for line, cell in zip(rows, ("precision", "fp32", "int4", "w8a8"), strict=True)}) == 1
    assert "[11/11] The bundle opened and asked: done" in progress


def test_the_next_command_works_as_it_is_printed(
    tiny_checkpoint: Path, tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("a bundle", []), ("bare", ["--language-precision", "none"])):
        folder = tmp_path / name
        assert export([str(tiny_checkpoint), str(folder), "--quiet", *options]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
        program, *arguments = shlex.split(line.removeprefix("next: "))
        assert program == "hivtp"
        arguments = [str(photo) if argument == "PHOTO" else argument for argument in arguments]
        assert main([*arguments, "--max-new-tokens", "2"]) == 0
        assert "2 tokens, finished by length" in capsys.readouterr().out


def test_without_a_decoder_the_table_says_who_answers(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quiet", "--language-precision", "none"]
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 0
    rows = table(capsys.readouterr().out)
    assert ["language", "none", "transformers answers, from the checkpoint"] in rows


def test_the_summary_says_where_layers_were_scaled_from_another_tower(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ["--graph", "encoder", "--quiet"]
    hint = (
        "the paper's for a tower of 24 layers, scaled to one of 6; others may do better: rank them on your own images"
    )
    assert export([str(tiny_checkpoint), str(tmp_path / "scaled"), *encoder]) == 0
    printed = capsys.readouterr().out
    assert hint in printed
    assert "next: " not in printed
    assert export([str(tiny_checkpoint), str(tmp_path / "chosen"), "--first-layer", "1", *encoder]) == 0
    assert hint not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ([], 8),
        (["--language-precision", "none"], 5),
        (["--graph", "encoder"], 5),
        (["--prefill-precision", "w8a8"], 11),
        (["--language-precision", "int4", "--language-rounding", "plain"], 8),
        (["--decoder-from", "{pruned}"], 6),
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
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 0
    done = re.findall(r"\[(\d+)/(\d+)\] .*: done", capsys.readouterr().err)
    assert done == [(str(step), str(num_steps)) for step in range(1, num_steps + 1)]
