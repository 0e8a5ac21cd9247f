"""The torch engine on the CPU, and on a GPU under the marker `gpu`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hivtp.engines import EngineSettings, cpu_engine, create_engine, open_vision_engine
from hivtp.engines.base import DeviceEngine
from hivtp.engines.bundle import Bundle
from hivtp.engines.torch.session import TorchEngine
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verification import jaccard, relative_error, sample_pixels
from hivtp_ops.errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines import Engine

SETTINGS = EngineSettings(num_threads=1)


@pytest.fixture(scope="module")
def bundle(exact_bundle: Path) -> Bundle:
    return Bundle.open(exact_bundle)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> TorchEngine:
    return TorchEngine(bundle.vision_file, SETTINGS, "cpu")


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Engine:
    return create_engine("onnxruntime", bundle.vision_file)


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype == np.int64:
            np.testing.assert_array_equal(found[name], array)
        else:
            assert relative_error(found[name], array) <= tolerance


def test_a_run_gives_what_onnxruntime_gives(engine: TorchEngine, reference: Engine) -> None:
    assert isinstance(engine, DeviceEngine)
    assert engine.output_names == reference.output_names
    for num_tiles in (1, 3):
        inputs = {"pixel_values": sample_pixels(num_tiles, 64)}
        check(engine.run(inputs), reference.run(inputs))


def test_an_output_that_is_kept_stays_a_tensor_of_its_own(engine: TorchEngine, reference: Engine) -> None:
    inputs = {"pixel_values": sample_pixels(2, 64)}
    view, outputs = engine.run_keeping(inputs, "image_embeds")
    assert isinstance(view.owner, torch.Tensor)
    assert (view.address, view.dtype) == (view.owner.data_ptr(), np.float32)
    engine.run_keeping({"pixel_values": -inputs["pixel_values"]}, "image_embeds")
    check({"image_embeds": view.owner.numpy(), **outputs}, reference.run(inputs))


def test_arrays_that_must_not_be_written_to_are_taken(engine: TorchEngine, reference: Engine, recwarn) -> None:
    pixels = sample_pixels(2, 64)
    pixels.flags.writeable = False
    check(engine.run({"pixel_values": pixels[::-1]}), reference.run({"pixel_values": pixels[::-1].copy()}))
    assert not recwarn.list


def test_a_compiled_engine_gives_the_same(bundle: Bundle, reference: Engine) -> None:
    engine = open_vision_engine(bundle, "torch", EngineSettings(num_threads=1, is_compiled=True))
    inputs = {"pixel_values": sample_pixels(1, 64)}
    for _ in range(2):
        check(engine.run(inputs), reference.run(inputs))


def test_a_compiler_that_is_missing_is_named(bundle: Bundle) -> None:
    engine = TorchEngine(bundle.vision_file, EngineSettings(1, is_compiled=True), "cpu")
    with (
        # What was compiled before would not be compiled again.
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(EngineError, match=r"cannot compile the vision graph for cpu: .*without vision_compile"),
    ):
        engine.run({"pixel_values": sample_pixels(4, 64)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"takes \['pixel_values'\], not \[\]"),
        ({"pixel_values": np.zeros((1, 3, 64, 63), np.float32)}, r"takes float32 of shape \['tiles', 3, 64, 64\]"),
        ({"pixel_values": np.zeros((1, 3, 64, 64))}, r"is float64 \[1, 3, 64, 64\]"),
        ({"pixel_values": np.zeros((0, 3, 64, 64), np.float32)}, r"have \[0\] tiles"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine: TorchEngine, inputs: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.run(inputs)


def test_without_a_gpu_torch_cuda_is_refused(bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"has no usable CUDA device here.*take the engine torch"):
        open_vision_engine(bundle, "torch-cuda")


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_a_missing_package_is_named_with_its_extra(bundle: Bundle, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'hivtp\[torch\]'"):
        open_vision_engine(bundle, "torch")


@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
def test_other_engines_compile_nothing_and_say_so(bundle: Bundle, name: str) -> None:
    with pytest.raises(EngineError, match=f"the engine {name} compiles nothing: choose torch or torch-cuda"):
        open_vision_engine(bundle, name, EngineSettings(is_compiled=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        EngineSettings(),
        EngineSettings(uses_cuda_graph=True),
        EngineSettings(is_compiled=True),
        EngineSettings(uses_cuda_graph=True, is_compiled=True),
    ],
    ids=["plain", "captured", "compiled", "compiled and captured"],
)
def test_a_gpu_gives_what_the_cpu_gives(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, settings: EngineSettings
) -> None:
    export = ExportSettings(preset="192", vision_precision=precision)
    bundle = Bundle.open(export_bundle(tiny_checkpoint, tmp_path / "bundle", export, is_quiet=True).folder)
    engine = open_vision_engine(bundle, "torch-cuda", settings)
    reference = create_engine(cpu_engine(precision), bundle.vision_file)
    kept = []
    # Numbers of tiles in turn: each captured run has buffers of its own, and what was kept outlives the next.
    for seed, num_tiles in enumerate((1, 3, 1, 1)):
        pixels = np.random.default_rng(seed).normal(size=(num_tiles, 3, 64, 64)).astype(np.float32)
        expected = reference.run({"pixel_values": pixels})
        view, outputs = engine.run_keeping({"pixel_values": pixels}, "image_embeds")
        assert view.owner.is_cuda
        kept.append((view.owner, outputs, expected))
    for embeds, outputs, expected in kept:
        is_same = (outputs["kept_indices"] == expected["kept_indices"]).all(axis=1)
        tolerance, least = {"fp32": (1e-4, 0.99), "fp16": (2e-2, 0.9), "bf16": (8e-2, 0.8)}[precision]
        assert jaccard(outputs["kept_indices"], expected["kept_indices"]) >= least
        assert relative_error(embeds.cpu().numpy()[is_same], expected["image_embeds"][is_same]) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("uses_cuda_graph", [False, True])
def test_the_host_waits_once_for_a_run(bundle: Bundle, uses_cuda_graph: bool) -> None:
    engine = open_vision_engine(bundle, "torch-cuda", EngineSettings(uses_cuda_graph=uses_cuda_graph))
    inputs = {"pixel_values": sample_pixels(1, 64)}
    for _ in range(3):
        engine.run_keeping(inputs, "image_embeds")
    # Anything that waits implicitly raises; the one wait, for the stream, is explicit.
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run_keeping(inputs, "image_embeds")
    finally:
        torch.cuda.set_sync_debug_mode("default")
