"""The vision engine transformers: the tower of the checkpoint gives what the bundle's graph gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, VisionOptions
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.torch_tower import TILES_PER_MAP, TransformersVision
from hivtp_ops import PruningSpec
from hivtp_ops.errors import EngineError, ScoreError
from tests.support.answers import PHOTOS, ask, assert_same_alone, assert_same_together, load

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Request

VARYING = PruningSpec(global_ratio=0.75)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llava": {},
    "full": {"vision_feature_select_strategy": "full"},
    "last layer": {"vision_feature_layer": -1},
    "llava_next": {"family": "llava_next"},
    "siglip": {"tower": "siglip"},
    "onevision": {"tower": "siglip", "family": "llava_onevision", "language": "qwen2"},
    "siglip, tiles": {"tower": "siglip", "family": "llava_next", "language": "qwen2"},
}
SETTINGS = {
    "unpruned": {"is_pruned": False},
    "paper": {"preset": "paper"},
    "192": {"preset": "192"},
    "varying": {"spec": VARYING},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    folder = tmp_path_factory.mktemp("tower") / "checkpoint"
    return make_checkpoint(folder, text=text, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module", params=SETTINGS)
def both(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Pipeline]:
    """A bundle whose images go through its graph, and through the tower in PyTorch."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    bundle = export_bundle(checkpoint, folder, ExportSettings(**SETTINGS[request.param]), is_quiet=True).folder
    language = {"backend": "transformers", "checkpoint": checkpoint, "cache_bytes": 0}
    return load(bundle, engine="onnxruntime", **language), load(bundle, engine="transformers", **language)


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    """With one tile more than fit into one attention map."""
    sizes = [(150, 60), (64, 64), (50, 130), (300, 40), (120, 120)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=True)]
    assert len(pictures) > TILES_PER_MAP
    return [
        ask("What is in the picture?", [pictures[0]]),
        ask("how many dogs"),
        ask("Is <image> brighter than <image>?", pictures[1:3]),
        ask("where is it", [pictures[3]]),
        ask("where is it", [pictures[4]], temperature=1.0, seed=3),
        ask("What is in the picture?", [pictures[0]]),
    ]


def test_outputs_are_those_of_the_graph_and_answers_too(both, requests, monkeypatch) -> None:
    graph, tower = (pipeline.model.images._encoder._vision.engine for pipeline in both)
    assert isinstance(tower, TransformersVision)
    assert tower.output_names == graph.output_names
    runs: list[tuple[Any, Any]] = []
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda inputs: runs.append((inputs, run(inputs))) or runs[-1][1])
    assert_same_together(*both, requests)
    assert_same_alone(*both, requests)
    has_mask = both[0].model.bundle.manifest.tiling is not None and len(graph.output_names) > 1
    for inputs, expected in runs:
        assert ("patch_mask" in inputs) == has_mask
        found = tower.run(inputs)
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
            if name.startswith("kept"):
                np.testing.assert_array_equal(found[name], array)
            else:
                np.testing.assert_allclose(found[name], array, atol=1e-4)
        if "importance" in expected:
            np.testing.assert_allclose(found["importance"], expected["importance"], rtol=1e-4)


def test_scores_that_hold_nan_are_an_error(tiny_checkpoint, pruned_bundle) -> None:
    pipeline = load(pruned_bundle, engine="transformers", backend="transformers", checkpoint=tiny_checkpoint)
    engine = pipeline.model.images._encoder._vision.engine
    engine._tower.encoder.layers[0].self_attn.q_proj.weight.data[0, 0] = np.nan
    with pytest.raises(ScoreError, match="hold NaN"):
        pipeline.generate(ask("what", [np.zeros((70, 70, 3), np.uint8)]))


def test_half_precision_gives_float32_embeddings_near_those_of_the_graph(tiny_checkpoint, exact_bundle, photo) -> None:
    options = {"backend": "transformers", "checkpoint": tiny_checkpoint}
    wide, half = load(exact_bundle), load(exact_bundle, engine="transformers", dtype="bfloat16", **options)
    prepared = wide.model.prepare(ask("what", [photo]))
    [expected], [found] = (pipeline.model.encode_images(prepared.pixels) for pipeline in (wide, half))
    assert found.embeds.dtype == np.float32
    kept, close = set(expected.tiles[0].kept_indices.tolist()), set(found.tiles[0].kept_indices.tolist())
    assert len(kept & close) / len(kept | close) > 0.8
    assert found.tiles[0].importance.dtype == np.float32


def test_it_needs_the_language_backend_transformers_and_a_gpu_to_be_taken(pruned_bundle, tiny_checkpoint) -> None:
    with pytest.raises(EngineError, match="the language backend transformers has; choose that backend too"):
        Pipeline.load(pruned_bundle, vision=VisionOptions("transformers"))
    pipeline = load(pruned_bundle, backend="transformers", checkpoint=tiny_checkpoint)
    assert type(pipeline.model.images._encoder._vision.engine).__name__ == "OnnxRuntimeEngine"
