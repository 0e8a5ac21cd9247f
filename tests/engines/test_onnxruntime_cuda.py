"""The engine for a GPU: its logic in host memory here; on a GPU under the marker `gpu`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from hivtp.engines import EngineSettings, create_engine, onnxruntime_cuda
from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import open_session
from hivtp.engines.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaEngine, has_cuda_provider
from hivtp.export.verify.checks import relative_error
from hivtp.export.verify.samples import sample_pixels
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines import Engine


@pytest.fixture(scope="module")
def graph(pruned_bundle: Path) -> Path:
    return Bundle.open(pruned_bundle).vision_file


@pytest.fixture(scope="module")
def reference(graph: Path) -> Engine:
    return create_engine("onnxruntime", graph)


@pytest.fixture
def pixels() -> np.ndarray:
    return sample_pixels(2, 64)


OrtValue = onnxruntime.OrtValue


class HostValue:
    """An OrtValue in host memory in the place of one on a GPU."""

    made: ClassVar[list[HostValue]] = []

    def __init__(self, value: onnxruntime.OrtValue) -> None:
        self._value = value
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, number: int) -> HostValue:
        assert (device, number) == ("cuda", 0)
        assert array.flags.c_contiguous
        return cls(OrtValue.ortvalue_from_numpy(array.copy()))

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, dtype: Any, device: str, number: int) -> HostValue:
        assert (device, number) == ("cuda", 0)
        return cls(OrtValue.ortvalue_from_shape_and_type(shape, dtype))

    def update_inplace(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._value.update_inplace(array)

    def numpy(self) -> np.ndarray:
        # What comes from a GPU is a copy.
        return self._value.numpy().copy()


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own code, on the CPU: its session, and the memory that it binds."""
    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", open_session)
    monkeypatch.setattr(onnxruntime, "OrtValue", HostValue)
    HostValue.made.clear()


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("uses_cuda_graph", [False, True])
def test_every_run_gives_what_a_plain_engine_gives_whatever_came_before(graph, reference, uses_cuda_graph):
    engine = OnnxRuntimeCudaEngine(graph, EngineSettings(uses_cuda_graph=uses_cuda_graph))
    kept = []
    for turn, num_tiles in enumerate([1, 2, 2, 1, 3, 2]):
        pixels = sample_pixels(num_tiles, 64) * np.float32(turn + 1)
        # Whatever the order of its memory.
        kept.append((pixels, engine.run({"pixel_values": np.asfortranarray(pixels)})))
    for pixels, found in kept:
        expected = reference.run({"pixel_values": pixels})
        assert engine.output_names == tuple(found) == tuple(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.usefixtures("on_host")
def test_recorded_runs_keep_their_memory_for_each_number_of_tiles(graph):
    engine = OnnxRuntimeCudaEngine(graph, EngineSettings(uses_cuda_graph=True))
    for num_tiles in (1, 1, 2, 1, 2):
        engine.run({"pixel_values": sample_pixels(num_tiles, 64)})
    # An input and four outputs for each of the two sizes; a recorded graph reads and writes at fixed addresses.
    assert len(HostValue.made) == 2 * 5


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("uses_cuda_graph", [False, True])
@pytest.mark.parametrize(
    "inputs", [{}, {"y": np.zeros(1, np.float32)}, {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}]
)
def test_inputs_that_do_not_fit_are_an_engine_error(graph, inputs, uses_cuda_graph):
    engine = OnnxRuntimeCudaEngine(graph, EngineSettings(uses_cuda_graph=uses_cuda_graph))
    with pytest.raises(EngineError, match="onnxruntime failed"):
        engine.run(inputs)


@pytest.fixture
def cpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.usefixtures("cpu_package")
def test_a_package_for_the_cpu_alone_says_what_to_install(graph):
    assert not has_cuda_provider()
    with pytest.raises(EngineError, match=r"built for the CPU alone; replace it: pip uninstall .*hivtp\[cuda\]"):
        create_engine("onnxruntime-cuda", graph)


@pytest.mark.usefixtures("cpu_package")
def test_two_packages_that_overwrite_each_other_are_named(graph, monkeypatch, tmp_path):
    for package in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / f"{package}-1.31.1.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.31.1\n"
        (tmp_path / f"{package}-1.31.1.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are both installed and overwrite each"):
        create_engine("onnxruntime-cuda", graph)


def test_without_any_package_the_extra_is_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not has_cuda_provider()
    with pytest.raises(MissingExtraError, match=r"hivtp\[cuda\]"):
        create_engine("onnxruntime-cuda", graph)


def test_cuda_that_does_not_start_is_an_error_and_not_the_cpu(graph, monkeypatch):
    if has_cuda_provider():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(onnxruntime_cuda, "check_cuda_package", lambda: None)
    with (
        pytest.warns(UserWarning, match="Specified provider"),
        pytest.raises(EngineError, match=r"could not start CUDA for .*model\.onnx.*hivtp\[cuda\]"),
    ):
        create_engine("onnxruntime-cuda", graph)


@pytest.mark.parametrize("uses_cuda_graph", [False, True])
def test_options_reach_the_provider(graph, monkeypatch, uses_cuda_graph):
    asked = []

    def note(_file: Path, _settings: EngineSettings, *, stops_spinning: bool, providers: list[Any]) -> SimpleNamespace:
        asked.append((stops_spinning, providers))
        return SimpleNamespace(get_providers=lambda: [PROVIDER])

    monkeypatch.setattr(onnxruntime_cuda, "check_cuda_package", lambda: None)
    monkeypatch.setattr(onnxruntime_cuda, "open_session", note)
    onnxruntime_cuda.open_cuda_session(graph, EngineSettings(uses_cuda_graph=uses_cuda_graph))
    expected = {"device_id": "0"} | ({"enable_cuda_graph": "1"} if uses_cuda_graph else {})
    assert asked == [(True, [(PROVIDER, expected), "CPUExecutionProvider"])]


@pytest.mark.gpu
@pytest.mark.parametrize("uses_cuda_graph", [False, True])
def test_a_gpu_gives_what_the_cpu_gives(graph, reference, uses_cuda_graph):
    engine = OnnxRuntimeCudaEngine(graph, EngineSettings(uses_cuda_graph=uses_cuda_graph))
    assert engine.session.get_providers()[0] == PROVIDER
    for num_tiles in (1, 2, 2, 2, 1, 1):
        pixels = sample_pixels(num_tiles, 64)
        found, expected = (some.run({"pixel_values": pixels}) for some in (engine, reference))
        # CUDA multiplies float32 matrices in TF32 where it may.
        assert relative_error(found["image_embeds"], expected["image_embeds"]) < 1e-2
        np.testing.assert_array_equal(found["kept_counts"], expected["kept_counts"])
