"""Configs of language models of which only some fields are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def text_config(**values: Any) -> Any:
    return SimpleNamespace(**{"vocab_size": 512, "hidden_size": 64, "max_position_embeddings": 4096, **values})
