"""The bundle, and the engines that run one graph of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.engines.base import Engine, EngineSettings
from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Engine", "EngineSettings", "create_engine"]


def create_engine(name: str, file: Path, settings: EngineSettings | None = None) -> Engine:
    """Open a graph in an engine.

    Args:
        name: "onnxruntime".
        file: the graph.
        settings: how to run it.

    Raises:
        EngineError: there is no such engine, or it cannot load the file.
        MissingExtraError: the engine's package is not installed.
    """
    if name == "onnxruntime":
        from hivtp.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, settings)
    raise EngineError(f"no engine is named {name!r}; there is onnxruntime")
