from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp.engines import EngineSettings
from hivtp.engines.tensorrt.profile import TileProfile
from hivtp.engines.tensorrt.session import TensorRtEngine
from hivtp_ops.errors import EngineError
from tests.engines.tensorrt import fake_gpu

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def open_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRtEngine]:
    fake_gpu.install(monkeypatch)

    def create(*profiles: str, uses_cuda_graph: bool = False, content: bytes = b"plan", library=None):
        record = SimpleNamespace(tile_profiles=tuple(map(TileProfile.parse, profiles)))
        settings = EngineSettings(uses_cuda_graph=uses_cuda_graph)
        return TensorRtEngine(library or fake_gpu.library(), content, record, settings)

    return create


def tiles(number: int, start: float = 0) -> np.ndarray:
    return np.arange(number * 3, dtype=np.float32).reshape(number, 3) + np.float32(start)


@pytest.mark.parametrize("uses_cuda_graph", [False, True])
def test_every_run_gives_its_own_outputs_whatever_came_before(open_engine, uses_cuda_graph):
    engine = open_engine("1:1:2", "1:2:4", uses_cuda_graph=uses_cuda_graph)
    assert (engine.output_names, engine.max_tiles) == (("double", "number"), 4)
    kept = []
    for turn, number in enumerate([1, 4, 4, 4, 2, 3, 1, 1, 4]):
        x = tiles(number, turn)
        kept.append((x, engine.run({"x": x})))
    for x, outputs in kept:
        np.testing.assert_array_equal(outputs["double"], 2 * x)
        np.testing.assert_array_equal(outputs["number"], [len(x)] * len(x))


def test_the_narrowest_profile_is_set_before_the_shapes(open_engine):
    engine = open_engine("1:1:4", "4:4:4")
    [context] = engine._engine.contexts
    for number, profile in ((1, 0), (4, 1), (3, 0)):
        engine.run({"x": tiles(number)})
        assert context.active_optimization_profile == profile


def test_a_cuda_graph_is_recorded_after_the_first_run_and_replayed_in_a_context_of_its_own(open_engine):
    engine = open_engine("1:1:4", uses_cuda_graph=True)
    for number in (1, 2):
        for _ in range(5):
            engine.run({"x": tiles(number)})
    shared, *own = engine._engine.contexts
    assert shared.num_runs == 0
    # One plain run and one that is recorded.
    assert [context.num_runs for context in own] == [2, 2]


def test_threads_take_turns(open_engine):
    engine = open_engine("1:1:8")
    inputs = [tiles(1 + index % 8, index) for index in range(64)]
    with ThreadPoolExecutor(4) as threads:
        for x, outputs in zip(inputs, threads.map(lambda x: engine.run({"x": x}), inputs), strict=True):
            np.testing.assert_array_equal(outputs["double"], 2 * x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"the plan takes \['x'\], not \[\]"),
        ({"x": tiles(1), "y": tiles(1)}, r"takes \['x'\], not \['x', 'y'\]"),
        ({"x": tiles(1).astype(np.float64)}, r"x is float64 \[1, 3\]; the plan takes float32 of shape \['tiles', 3\]"),
        ({"x": tiles(1)[:, :2]}, r"x is float32 \[1, 2\]"),
        ({"x": tiles(3)[0]}, r"x is float32 \[3\]"),
        ({"x": tiles(0)}, r"\[0\] tiles do not fit a plan for 1:2:4 tiles; build it with other --tiles"),
        ({"x": tiles(5)}, r"\[5\] tiles do not fit"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_runs(open_engine, inputs, message):
    engine = open_engine("1:2:4")
    with pytest.raises(EngineError, match=message):
        engine.run(inputs)
    assert [context.num_runs for context in engine._engine.contexts] == [0]


def test_a_plan_that_the_library_refuses_is_an_error_with_its_reason(open_engine):
    with pytest.raises(EngineError, match=r"tensorrt 11.4.0.106 cannot load the plan: the header is wrong"):
        open_engine("1:1:1", content=b"refused")


def test_a_failed_run_is_an_engine_error(open_engine):
    engine = open_engine("1:1:1")
    engine._engine.contexts[0].fails = True
    with pytest.raises(EngineError, match="cannot run 1 tiles: it gives no reason"):
        engine.run({"x": tiles(1)})


def test_the_library_is_asked_about_a_plan_where_it_can_be_asked(open_engine):
    library = fake_gpu.library()

    class Diagnostics(IntEnum):
        VERSION_MISMATCH = 1
        UNSUPPORTED_CC = 2

    class Runtime(fake_gpu.Runtime):
        def get_engine_validity(self, _content: bytes) -> tuple[str, int]:
            return "invalid", 3

    library.module.Runtime = Runtime
    library.module.EngineValidity = SimpleNamespace(INVALID="invalid")
    library.module.EngineInvalidityDiagnostics = Diagnostics
    with pytest.raises(EngineError, match="cannot load the plan: version mismatch, unsupported cc"):
        open_engine("1:1:1", library=library)


@pytest.mark.tensorrt
def test_the_stand_ins_offer_nothing_that_the_real_interfaces_lack():
    import cuda.core
    import tensorrt_rtx as trt

    pairs = [
        (fake_gpu.Runtime, trt.Runtime),
        (fake_gpu.Engine, trt.ICudaEngine),
        (fake_gpu.Context, trt.IExecutionContext),
        (fake_gpu.Device, cuda.core.Device),
        (fake_gpu.Stream, cuda.core.Stream),
        (fake_gpu.Buffer, cuda.core.Buffer),
        (fake_gpu.GraphBuilder, cuda.core.graph.GraphBuilder),
        (fake_gpu.PinnedMemory, cuda.core.LegacyPinnedMemoryResource),
    ]
    # What the stand-ins keep for themselves, and `launch`, which is the finished graph's.
    own = {"do", "streams", "launch"}
    for fake, real in pairs:
        offered = {name for name in vars(fake) if not name.startswith("_")} - own
        assert offered <= set(dir(real)), real
    assert hasattr(cuda.core.graph.Graph, "launch")
    assert {"INPUT", "OUTPUT"} <= set(trt.TensorIOMode.__members__)
    dtypes = [trt.nptype(dtype) for dtype in (trt.float32, trt.int64, trt.bool)]
    assert [np.dtype(dtype) for dtype in dtypes] == [np.float32, np.int64, np.bool_]
