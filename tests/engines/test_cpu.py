from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hivtp.engines import cpu, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.runtime.language import create_language
from hivtp_ops.errors import EngineWarning

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = "processor : 0\nflags     : fpu sse2 avx2 avx512f avx512bw\nprocessor : 1\nflags     : fpu sse2 avx2\n"


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system says of an x86 processor; to be written."""
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_a_processor_with_any_kind_of_vnni_does_not_overflow(processor: Path, flag: str) -> None:
    processor.write_text(PLAIN.replace("avx512bw", flag))
    assert not cpu.can_overflow_int8()
    # Not a part of another word.
    processor.write_text(PLAIN.replace("avx512bw", f"{flag}_of_some_other_kind"))
    assert cpu.can_overflow_int8()


def test_arm_does_not_overflow_and_the_unknown_is_trusted(processor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cpu.can_overflow_int8()
    processor.write_text("processor : 0\n")
    assert not cpu.can_overflow_int8()
    processor.write_text(PLAIN)
    assert cpu.can_overflow_int8()
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert not cpu.can_overflow_int8()


def test_int8_graphs_warn_where_they_overflow_and_no_others(processor: Path, prefill_bundle: Path) -> None:
    processor.write_text(PLAIN)
    bundle = Bundle.open(prefill_bundle)
    with pytest.warns(EngineWarning, match="no VNNI, so the int8 products of the decoder for prompts can overflow"):
        create_language(bundle)
    manifest = bundle.manifest
    # The graph is float32; that it is called int8 is what is looked at.
    called_int8 = replace(bundle, manifest=replace(manifest, vision=replace(manifest.vision, precision="int8")))
    with pytest.warns(EngineWarning, match="int8 products of the vision graph"):
        open_vision_engine(called_int8, "onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_vision_engine(bundle, "onnxruntime")
        processor.write_text(PLAIN.replace("avx2", "avx_vnni"))
        create_language(bundle)
