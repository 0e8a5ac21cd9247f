from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def endless_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on for minutes: a long context, and nothing that ends an answer."""
    folder = tmp_path_factory.mktemp("endless")
    text = {"initializer_range": 0.2, "max_position_embeddings": 65536}
    checkpoint = make_checkpoint(folder / "checkpoint", text=text)
    bundle = export_bundle(checkpoint, folder / "bundle", ExportSettings(preset="64"), is_quiet=True).folder
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["language"]["eos_token_ids"] = []
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle
