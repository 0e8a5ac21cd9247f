from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from polygraphy.backend import trt
from polygraphy.exception import PolygraphyException

from hivtp.engines import open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.engines.tensorrt.session import TensorRtEngine
from hivtp.runtime.integrations.polygraphy import runner as module
from hivtp.runtime.integrations.polygraphy.comparison import RunnerSettings
from hivtp.runtime.integrations.polygraphy.images import image_feeds
from hivtp.runtime.integrations.polygraphy.runner import EngineRunner, bundle_runner, open_runner
from hivtp.runtime.vision.agreement import VisionTolerance
from hivtp_ops.errors import CheckpointError, EngineError, MissingExtraError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hivtp.engines.base import Arrays

SETTINGS = RunnerSettings(num_threads=1)


class Limited:
    """An engine that takes two tiles at once."""

    max_tiles = 2

    def __init__(self, bundle: Bundle) -> None:
        self.engine = open_vision_engine(bundle, "onnxruntime")
        self.output_names = self.engine.output_names
        self.sizes: list[int] = []

    def run(self, inputs: Arrays) -> dict[str, Any]:
        self.sizes.append(len(inputs["pixel_values"]))
        return self.engine.run(inputs)


class Broken(Limited):
    def run(self, inputs: Arrays) -> dict[str, Any]:
        raise EngineError(f"no run of {len(inputs['pixel_values'])} tiles")


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name


def first_feed(bundle: Bundle, images: list[str]) -> dict[str, Any]:
    return image_feeds(bundle, images[:1])[0][0]


@pytest.mark.parametrize("engine", ["onnxruntime", "polygraphy-onnxrt"])
def test_a_runner_gives_what_the_engine_gives(either_bundle, images, engine):
    bundle = Bundle.open(either_bundle)
    feed = first_feed(bundle, images)
    with open_runner(bundle, engine, SETTINGS, "mine").runner as runner:
        assert runner.name == "mine"
        assert_same(runner.infer(feed), open_vision_engine(bundle, "onnxruntime").run(feed))
        assert runner.last_inference_time() > 0


def test_the_tower_of_the_checkpoint_is_a_runner(next_bundle, next_checkpoint, images):
    bundle = Bundle.open(next_bundle)
    feed = first_feed(bundle, images)
    expected = open_vision_engine(bundle, "onnxruntime").run(feed)
    with open_runner(bundle, "transformers", RunnerSettings(checkpoint=next_checkpoint), "tower").runner as runner:
        found = runner.infer(feed)
    assert np.array_equal(found["kept_indices"], expected["kept_indices"])
    assert np.allclose(found["image_embeds"], expected["image_embeds"], atol=1e-5)


def test_a_runner_says_what_its_graph_takes(bare_bundle, next_bundle, make_next_bundle):
    inputs = {}
    for name, folder in {"llava": bare_bundle, "next": next_bundle, "bare": make_next_bundle(is_pruned=False)}.items():
        bundle = Bundle.open(folder)
        for engine in ("onnxruntime", "polygraphy-onnxrt"):
            with open_runner(bundle, engine, SETTINGS, "mine").runner as runner:
                metadata = runner.get_input_metadata(use_numpy_dtypes=False)
                inputs[name, engine] = {key: (str(kind), list(shape)[1:]) for key, (kind, shape) in metadata.items()}
        # Polygraphy reads it off the graph.
        assert inputs[name, "onnxruntime"] == inputs[name, "polygraphy-onnxrt"]
    assert [len(inputs[name, "onnxruntime"]) for name in ("llava", "next", "bare")] == [1, 2, 1]


def test_an_engine_that_takes_few_tiles_runs_several_times(next_bundle, images):
    bundle = Bundle.open(next_bundle)
    engine, feed = Limited(bundle), first_feed(bundle, images)
    with EngineRunner(lambda: engine, bundle) as runner:
        assert_same(runner.infer(feed), engine.engine.run(feed))
    assert engine.sizes == [2, 2, 1]


def test_an_error_of_an_engine_is_one_of_polygraphy(bare_bundle, images):
    bundle = Bundle.open(bare_bundle)
    with (
        EngineRunner(lambda: Broken(bundle), bundle) as runner,
        pytest.raises(PolygraphyException, match="no run of 1 tiles"),
    ):
        runner.infer(first_feed(bundle, images))
    with pytest.raises(PolygraphyException, match=r"holds no plan for|tensorrt is not installed"):
        bundle_runner(str(bare_bundle), "tensorrt").activate()


@pytest.mark.parametrize(
    ("checkpoint", "kind", "message"),
    [
        (None, SettingsError, "name its folder as the checkpoint"),
        ("/nowhere", CheckpointError, "is not a folder; give the folder of the checkpoint 'checkpoint'"),
    ],
)
def test_the_tower_needs_its_checkpoint(bare_bundle, checkpoint, kind, message):
    with pytest.raises(kind, match=message):
        open_runner(Bundle.open(bare_bundle), "transformers", RunnerSettings(checkpoint), "mine")


def test_the_tolerance_is_that_of_the_export(bare_bundle):
    bundle = Bundle.open(bare_bundle)
    tolerance = open_runner(bundle, "onnxruntime", SETTINGS, "mine").tolerance
    assert tolerance == VisionTolerance(relative_error=1e-4, min_jaccard=0.99, importance_error=1e-3)


@pytest.mark.parametrize("is_done", [True, False])
def test_the_tolerance_of_a_plan_is_the_one_it_was_checked_with(bare_bundle, monkeypatch, is_done):
    bundle = Bundle.open(bare_bundle)
    wide = {"relative_error": 0.5, "min_jaccard": 0.3, "importance_error": 0.7}
    engine = object.__new__(TensorRtEngine)
    engine.record = SimpleNamespace(verification={"is_done": is_done, "tolerance": wide})
    monkeypatch.setattr(module, "open_engine", lambda *_: engine)
    found = open_runner(bundle, "tensorrt", SETTINGS, "mine").tolerance
    narrow = VisionTolerance.read(bundle.manifest.verification["vision"])
    assert found == (VisionTolerance(**wide) if is_done else narrow)


def test_polygraphy_runs_the_very_plan_that_was_checked(bare_bundle, monkeypatch):
    record = SimpleNamespace(verification={"is_done": False})
    asked = []

    def read_plan(bundle: Bundle, library: str, gpu: str, *, trust_plans: bool) -> tuple[Any, bytes]:
        asked.append((bundle.folder, library, gpu, trust_plans))
        return record, b"plan"

    monkeypatch.setattr(module, "load_library", lambda name: f"library {name}")
    monkeypatch.setattr(module, "find_gpu", lambda extra: f"GPU for {extra}")
    monkeypatch.setattr(module, "read_plan", read_plan)
    monkeypatch.setattr(trt, "EngineFromBytes", lambda plan: lambda: f"engine of {plan!r}")
    bundle = Bundle.open(bare_bundle)
    runner = open_runner(bundle, "polygraphy-trt", RunnerSettings(trust_plans=True), "mine").runner
    assert isinstance(runner, trt.TrtRunner)
    assert (runner.name, runner._engine_or_context) == ("mine", "engine of b'plan'")
    assert asked == [(bundle.folder, "library tensorrt", "GPU for tensorrt", True)]
    monkeypatch.setattr(trt, "EngineFromBytes", lambda _: 1 / 0)
    with pytest.raises(EngineError, match="Polygraphy cannot load the plan: division by zero"):
        open_runner(bundle, "polygraphy-trt", SETTINGS, "mine")


def test_a_missing_onnxruntime_is_named(bare_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed; .*hivtp\[cpu\]"):
        open_runner(Bundle.open(bare_bundle), "polygraphy-onnxrt", SETTINGS, "mine")
