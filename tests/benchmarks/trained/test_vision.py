from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.trained import vision
from benchmarks.trained.tables import language_table, vision_table

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_every_precision_is_compared_on_every_image(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "PRECISIONS", ("fp32", "int8"))
    monkeypatch.setattr(vision, "PRESETS", ("192",))
    files = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(256, size=(60, 80, 3), dtype=np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    rows = vision.measure_vision(tiny_checkpoint, files, tmp_path / "graphs", 1)
    assert [(row["choice"], row["precision"]) for row in rows] == [
        (choice, precision) for choice in ("default", "chosen") for precision in ("fp32", "int8")
    ]
    for row in rows:
        assert list(row["images"]) == ["0.png", "1.png"]
        is_reference = row["precision"] == "fp32"
        for found in row["images"].values():
            assert (found["relative_error"] == 0) == is_reference
            assert found["kept_jaccard"] <= 1
    head, *lines = vision_table({"vision": rows})
    assert len(lines) == 2
    assert {len(line) for line in lines} == {len(head)}


def test_the_table_of_decoders_has_perplexities() -> None:
    pieces = [{"nats": nats, "same_token": 0.5, "logits_error": 0.1} for nats in (1.0, 3.0)]
    assert language_table({"language": [{"decoder": "int4", "pieces": pieces}]})[1] == [
        "int4",
        "7.39",
        "50.0 %",
        "0.100",
    ]
