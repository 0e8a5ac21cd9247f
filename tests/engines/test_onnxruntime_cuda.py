"""The bound engine, in host memory here; on a GPU under the marker `gpu`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch

from hivtp.engines import EngineSettings, create_engine, onnxruntime_cuda
from hivtp.engines.bundle import Bundle
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


@pytest.fixture(scope="module")
def engine(graph: Path) -> OnnxRuntimeCudaEngine:
    return OnnxRuntimeCudaEngine(graph, device="cpu")


@pytest.fixture
def pixels() -> np.ndarray:
    return sample_pixels(2, 64)


def test_bound_memory_gives_what_a_plain_run_gives(engine, reference, pixels):
    expected = reference.run({"pixel_values": pixels})
    found = engine.run({"pixel_values": pixels})
    assert engine.output_names == tuple(found) == tuple(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_outputs_leave_by_dlpack_without_a_copy(engine, reference, pixels):
    outputs = engine.run_on_device({"pixel_values": pixels})
    embeds = torch.from_dlpack(outputs["image_embeds"])
    assert embeds.data_ptr() == outputs["image_embeds"].data_ptr()
    expected = reference.run({"pixel_values": pixels})["image_embeds"]
    np.testing.assert_array_equal(embeds.numpy(), expected)
    # They are the caller's: a further run does not change them.
    engine.run_on_device({"pixel_values": -pixels})
    np.testing.assert_array_equal(embeds.numpy(), expected)


def test_an_output_that_is_kept_stays_on_the_device_and_the_others_come_to_the_host(engine, reference, pixels):
    expected = reference.run({"pixel_values": pixels})
    view, outputs = engine.run_keeping({"pixel_values": pixels}, "image_embeds")
    assert (view.shape, view.dtype) == (expected["image_embeds"].shape, np.float32)
    assert view.address == view.owner.data_ptr()
    engine.run_keeping({"pixel_values": -pixels}, "image_embeds")
    np.testing.assert_array_equal(view.owner.numpy(), expected.pop("image_embeds"))
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(outputs[name], array)


def test_inputs_come_by_dlpack(engine, reference, pixels):
    expected = reference.run({"pixel_values": pixels})["image_embeds"]
    tensor = torch.from_numpy(pixels)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(pixels)
    for given in (tensor, value, pixels[:, ::-1][:, ::-1]):
        found = engine.run_on_device({"pixel_values": given})["image_embeds"].numpy()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "inputs", [{}, {"y": np.zeros(1, np.float32)}, {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}]
)
def test_inputs_that_do_not_fit_are_an_engine_error(engine, inputs):
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


def test_options_reach_the_provider():
    assert onnxruntime_cuda._provider_options(False, None) == {"device_id": "0"}
    assert onnxruntime_cuda._provider_options(True, 4711) == {
        "device_id": "0",
        "enable_cuda_graph": "1",
        "user_compute_stream": "4711",
    }


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


@pytest.mark.gpu
def test_outputs_stay_on_the_gpu_for_torch(graph, reference, pixels):
    engine = OnnxRuntimeCudaEngine(graph, stream=torch.cuda.current_stream().cuda_stream)
    outputs = engine.run_on_device({"pixel_values": torch.from_numpy(pixels).cuda()})
    embeds = torch.from_dlpack(outputs["image_embeds"])
    assert embeds.is_cuda
    assert embeds.data_ptr() == outputs["image_embeds"].data_ptr()
    expected = reference.run({"pixel_values": pixels})["image_embeds"]
    assert relative_error(embeds.cpu().numpy(), expected) < 1e-2
