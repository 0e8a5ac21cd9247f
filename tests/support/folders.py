"""Checkpoint folders that are damaged or edited by a test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def edit_json(file: Path, edit: Callable[[Any], object] | None = None, **values: Any) -> None:
    """Change a JSON object in place; it is made where it is missing."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(values)
    if edit is not None:
        edit(content)
    file.write_text(json.dumps(content))


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the weights of model.safetensors other names."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
