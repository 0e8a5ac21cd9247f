"""Plans to put into bundles: real files and sidecars around content that no library reads."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hivtp.engines.gpu import Gpu
from hivtp.engines.manifest import FileRecord
from hivtp.engines.tensorrt.plan import graph_hashes, sha256_of_plan, write_plan
from hivtp.engines.tensorrt.plan_record import PlanRecord

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.bundle import Bundle

CONTENT = b"a plan " * 1000
H200 = Gpu("NVIDIA H200", (9, 0), driver="580.65.06", cuda="13.0")
RTX = Gpu("NVIDIA GeForce RTX 5090", (12, 0), driver="580.65.06", cuda="13.0")


def make_record(bundle: Bundle, content: bytes = CONTENT, **changes: Any) -> PlanRecord:
    record = PlanRecord(
        plan=FileRecord(len(content), sha256_of_plan(content)),
        graph=graph_hashes(bundle),
        library="tensorrt",
        library_version="11.4.0.106",
        platform=sysconfig.get_platform(),
        gpu=H200,
        is_portable=False,
        profiles=("1:1:4", "5:5:5"),
        pruning="function",
        precision="fp16",
        allows_tf32=True,
        workspace_bytes=None,
        optimization_level=3,
        verification={"is_done": True, "tiles": [1, 5], "tolerance": {"relative_error": 0.01}},
        versions={"hivtp": "0.1.0"},
    )
    return replace(record, **changes)


def add(bundle: Bundle, content: bytes = CONTENT, **changes: Any) -> Path:
    return write_plan(bundle, make_record(bundle, content, **changes), memoryview(content))
