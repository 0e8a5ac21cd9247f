from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.trained import __main__ as command
from benchmarks.trained.language import DECODERS

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_one_part_can_be_measured_and_the_other_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    piece = {"nats": 1.0, "same_token": 1.0, "logits_error": 0.0}
    output.write_text(json.dumps({"vision": [], "language": [], "settings": {}}), encoding="utf-8")
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr(command, "measure_language", lambda *_arguments: [{"decoder": "new", "pieces": [piece]}])
    monkeypatch.setattr(command, "photographs", list)
    monkeypatch.setattr(command, "text", str)
    command.main(["--work-dir", str(tmp_path), "--output", str(output), "--parts", "language"])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["vision"] == []
    assert [row["decoder"] for row in found["language"]] == ["new"]
    assert "new  " in capsys.readouterr().out


def test_each_way_of_rounding_stands_beside_the_plain_one() -> None:
    plain = {name.removesuffix(", plain") for name in DECODERS if name.endswith(", plain")}
    assert plain == {"w8a8", "int4, blocks of 32", "int4, blocks of 128"}
    for name in plain:
        kinds = DECODERS[name].decoder, DECODERS[f"{name}, plain"].decoder
        assert [kind.rounding for kind in kinds] == ["calibrated", "plain"]
        assert kinds[0].block_size == kinds[1].block_size
