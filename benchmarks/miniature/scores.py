"""The record beside the miniature's weights: what made them, how well they answer, which layers to prune by."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.miniature.evaluate import NUM_PICTURES, evaluate, table, to_dict
from benchmarks.miniature.layers import LayerRange, rank_layers
from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import CALIBRATION, HELD_OUT, draw
from benchmarks.pipelines import load_pipeline
from benchmarks.timing.table import aligned
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings

SCORES_NAME = "scores.json"
NUM_CALIBRATION_PICTURES = 300
# What is kept, and the preset that keeps it.
BUDGETS = {"unpruned": None, "50 %": "288", "22 %": "128", "11 %": "64"}


def settings_of(preset: str | None, layers: LayerRange) -> ExportSettings:
    """How to export the miniature with a preset and these layers; None leaves it unpruned."""
    return ExportSettings(is_pruned=False) if preset is None else ExportSettings(spec=layers.fit(preset))


def chosen_layers(checkpoint: Path = CHECKPOINT) -> LayerRange:
    """The layers that calibration chose for a trained miniature."""
    return LayerRange(**json.loads((checkpoint / SCORES_NAME).read_text())["layers"])


def write_scores(checkpoint: Path, training: dict[str, Any]) -> Path:
    """Choose the layers of a trained miniature, measure its bundles, and write the record into its folder.

    Args:
        checkpoint: the trained miniature.
        training: what made it, for the record.
    """
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32", attn_implementation="eager")
    ranked = rank_layers(model, [draw(seed) for seed in CALIBRATION[:NUM_CALIBRATION_PICTURES]])
    for layers in ranked:
        print(f"layers {layers.first_layer} +{layers.num_layers}: worth {layers.worth:.3f}, ratio {layers.ratio:.2f}")
    accuracy = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, preset in BUDGETS.items():
            bundle = Path(folder) / str(preset)
            export_bundle(checkpoint, bundle, settings_of(preset, ranked[0]), is_quiet=True)
            with load_pipeline(bundle) as pipeline:
                accuracy[name] = to_dict(evaluate(pipeline, HELD_OUT[:NUM_PICTURES]))
            print(f"\n{name}\n{aligned(table(accuracy[name]))}", flush=True)
    record = {
        "training": training,
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "held_out_pictures": NUM_PICTURES,
        "accuracy": accuracy,
        "calibration_pictures": NUM_CALIBRATION_PICTURES,
        "layers": asdict(ranked[0]),
    }
    file = checkpoint / SCORES_NAME
    file.write_text(json.dumps(record, indent=2) + "\n")
    return file
