"""The vision graph in OpenVINO against ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, SamplingParams, VisionOptions
from hivtp.engines import EngineSettings, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.engines.openvino.library import resolve_precision, shared_core
from hivtp.engines.signature import vision_tensors
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import EngineError, EngineWarning, MissingExtraError, OutOfMemoryError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytest.importorskip("openvino", reason="openvino is not installed")

BUNDLES = ["pruned_bundle", "unpruned_bundle", "exact_bundle", "varying_bundle"]
FLOAT = EngineSettings(num_threads=1, precision="float32")
AUTO = EngineSettings(num_threads=1)


@pytest.fixture
def in_bfloat16() -> None:
    """Whether "auto" means bfloat16 here."""
    if resolve_precision(shared_core(), "auto") != "bfloat16":
        pytest.skip("this processor has no instructions for bfloat16")


def pixels(num_tiles: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return {"pixel_values": np.random.default_rng(seed).normal(size=(num_tiles, 3, 64, 64)).astype(np.float32)}


def of(bundle: Path, inputs: dict[str, NDArray[np.float32]], settings: EngineSettings | None = None) -> dict:
    """What OpenVINO gives; ONNX Runtime without settings for it."""
    engine = "onnxruntime" if settings is None else "openvino"
    return open_vision_engine(Bundle.open(bundle), engine, settings or AUTO).run(inputs)


@pytest.mark.parametrize("name", BUNDLES)
def test_in_float32_it_is_onnxruntime_to_the_last_digits(request, name):
    bundle = request.getfixturevalue(name)
    inputs = pixels(3, seed=1)
    expected, found = of(bundle, inputs), of(bundle, inputs, FLOAT)
    assert list(found) == list(expected)
    for output, values in expected.items():
        assert found[output].dtype == values.dtype
        if output in ("kept_indices", "kept_counts"):
            np.testing.assert_array_equal(found[output], values)
        else:
            np.testing.assert_allclose(found[output], values, atol=1e-5)


@pytest.mark.usefixtures("in_bfloat16")
@pytest.mark.parametrize("name", BUNDLES[:1] + BUNDLES[2:])
def test_bfloat16_keeps_what_float32_keeps_and_rounds_the_rest_alone(request, name):
    bundle = request.getfixturevalue(name)
    for seed in range(8):
        inputs = pixels(2, seed)
        expected, found = of(bundle, inputs), of(bundle, inputs, AUTO)
        np.testing.assert_array_equal(found["kept_indices"], expected["kept_indices"])
        np.testing.assert_allclose(found["importance"], expected["importance"], atol=1e-6)
        error = np.linalg.norm(found["image_embeds"] - expected["image_embeds"])
        assert 1e-4 < error / np.linalg.norm(expected["image_embeds"]) < 3e-2


@pytest.mark.usefixtures("in_bfloat16")
def test_all_in_bfloat16_rounds_the_scores_too(pruned_bundle):
    """So the part in float32 is of use, and the test before can fail."""
    expected = of(pruned_bundle, pixels(2))
    found = of(pruned_bundle, pixels(2), EngineSettings(num_threads=1, precision="bfloat16"))
    assert np.abs(found["importance"] - expected["importance"]).max() > 1e-5


@pytest.mark.parametrize("settings", [FLOAT, AUTO])
def test_a_tile_gives_alone_what_it_gives_among_others(pruned_bundle, settings):
    engine = open_vision_engine(Bundle.open(pruned_bundle), "openvino", settings)
    inputs = pixels(4)
    together = engine.run(inputs)
    for tile in range(4):
        alone = engine.run({"pixel_values": inputs["pixel_values"][tile : tile + 1]})
        for name, values in together.items():
            np.testing.assert_allclose(alone[name][0], values[tile], atol=1e-5)


def test_threads_run_at_once_and_each_keeps_its_outputs(pruned_bundle):
    engine = open_vision_engine(Bundle.open(pruned_bundle), "openvino", AUTO)
    expected = [engine.run(pixels(1 + seed % 3, seed)) for seed in range(12)]
    found: list[dict] = [{}] * 12

    def run(seed: int) -> None:
        found[seed] = engine.run(pixels(1 + seed % 3, seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["image_embeds"], other["image_embeds"])


def test_padding_is_never_kept(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    settings = ExportSettings(preset="192", language_precision="none")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    side, patches = bundle.manifest.vision.image_size, bundle.manifest.vision.num_patches
    assert "patch_mask" in vision_tensors(bundle.manifest)[0]
    inputs = {
        "pixel_values": np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32),
        "patch_mask": np.arange(2 * patches).reshape(2, patches) % 3 > 0,
    }
    expected = open_vision_engine(bundle, "onnxruntime", AUTO).run(inputs)
    found = open_vision_engine(bundle, "openvino", AUTO).run(inputs)
    np.testing.assert_array_equal(found["kept_indices"], expected["kept_indices"])
    np.testing.assert_array_equal(found["kept_counts"], expected["kept_counts"])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_graphs_run_in_float32(make_bundle, precision):
    bundle = make_bundle(is_pruned=False, vision_precision=precision)
    expected, found = of(bundle, pixels(1)), of(bundle, pixels(1), AUTO if precision == "int8" else FLOAT)
    np.testing.assert_allclose(found["image_embeds"], expected["image_embeds"], atol=2e-2)


def test_an_fp8_graph_runs_and_warns(fp8_bundle):
    with pytest.warns(EngineWarning, match="openvino runs the fp8 vision graph of .* several times slower"):
        found = of(fp8_bundle, pixels(1), AUTO)
    assert found["image_embeds"].any()


def test_the_encoder_graph_is_float32_by_default(make_bundle):
    bundle = make_bundle(graph="encoder")
    expected, found = of(bundle, pixels(1)), of(bundle, pixels(1), AUTO)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_an_answer_says_what_ran(pruned_bundle, photo):
    vision = VisionOptions("openvino", precision="float32")
    with Pipeline.load(pruned_bundle, vision=vision) as openvino, Pipeline.load(pruned_bundle) as onnxruntime:
        found, expected = (
            pipeline.generate("what is it", [photo], SamplingParams(max_new_tokens=6))
            for pipeline in (openvino, onnxruntime)
        )
    assert found.token_ids == expected.token_ids
    assert found.kept_indices == expected.kept_indices
    assert found.ran.vision == "fp32 graph in openvino in float32"
    assert expected.ran.vision == "fp32 graph in onnxruntime"
    assert found.to_dict()["ran"]["language"] == "fp32 decoder in onnxruntime"


def test_openvino_that_is_missing_says_what_to_install(pruned_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"openvino is not installed; .*pip install 'hivtp\[openvino\]'"):
        of(pruned_bundle, pixels(1), AUTO)


def test_onnx_that_is_missing_says_what_to_install(pruned_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"onnx is not installed; .*pip install 'hivtp\[openvino\]'"):
        of(pruned_bundle, pixels(1), AUTO)


def test_inputs_that_do_not_fit_are_an_engine_error(pruned_bundle):
    engine = open_vision_engine(Bundle.open(pruned_bundle), "openvino", AUTO)
    with pytest.raises(EngineError, match="openvino failed while running the vision graph") as caught:
        engine.run({"pixel_values": np.zeros((1, 3, 16, 16), np.float32)})
    assert "Exception from" not in str(caught.value)
    assert engine.run(pixels(1))["kept_counts"].shape == (1,)


def test_memory_that_runs_out_says_what_to_do(pruned_bundle, monkeypatch):
    engine = open_vision_engine(Bundle.open(pruned_bundle), "openvino", AUTO)

    class Full:
        outputs = ()

        def create_infer_request(self) -> None:
            raise RuntimeError("Exception from src/x.cpp:1:\nstd::bad_alloc\n")

    monkeypatch.setattr(engine, "_parts", [(Full(), ())])
    with pytest.raises(OutOfMemoryError, match=r"running the vision graph \(std::bad_alloc\); give fewer"):
        engine.run(pixels(1))


INTERRUPTED = """
import faulthandler, gc, signal, sys, threading
from hivtp.engines import EngineSettings, open_vision_engine
from hivtp.engines.bundle import Bundle

# Python handles signals on the stack that is made here, as pytest makes one.
faulthandler.enable()
engines = [open_vision_engine(Bundle.open(sys.argv[1]), "openvino", EngineSettings()) for _ in range(2)]
engines.pop(0)
gc.collect()
closing = threading.Thread(target=engines.clear)
closing.start()
closing.join()
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_engines_are_closed_is_no_crash(pruned_bundle):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(pruned_bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_threads_that_open_engines_at_once_share_one_core(monkeypatch):
    class Slow:
        def __init__(self) -> None:
            time.sleep(0.1)

    openvino = ModuleType("openvino")
    openvino.Core = Slow
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    with ThreadPoolExecutor(8) as threads:
        cores = list(threads.map(lambda _: shared_core(), range(8)))
    assert all(core is cores[0] for core in cores)


def test_a_precision_that_the_processor_lacks_is_refused(pruned_bundle, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(EngineError, match="cannot compute in bfloat16 on this processor; choose"):
        of(pruned_bundle, pixels(1), EngineSettings(precision="bfloat16"))


def test_a_precision_is_for_openvino_alone():
    with pytest.raises(SettingsError, match="precision 'float32' belongs to the vision engine openvino"):
        VisionOptions("onnxruntime", precision="float32")
    with pytest.raises(SettingsError, match="precision must be one of auto, float32, bfloat16, not 'int8'"):
        VisionOptions("openvino", precision="int8")
