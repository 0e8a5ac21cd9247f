"""Which engine runs the vision graph: the one that is named, or the first that works."""

from __future__ import annotations

import shutil
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hivtp.engines.torch import session as torch_session

from hivtp import Pipeline, engines
from hivtp.engines import EngineSettings, onnxruntime_cuda, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import OnnxRuntimeEngine
from hivtp.engines.tensorrt import session
from hivtp.engines.tensorrt.library import load_library
from hivtp_ops.errors import EngineError, EngineWarning, MissingExtraError
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import H200, RTX, add
from tests.support.command import hivtp_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(pruned_bundle, tmp_path / "bundle"))


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    load_library.cache_clear()


@pytest.fixture
def tensorrt_on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(session, "load_library", fake_gpu.library)
    monkeypatch.setattr(session, "find_gpu", lambda _extra: H200)


@pytest.fixture
def in_bfloat16(bf16_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bf16_bundle, tmp_path / "bf16"))


def test_a_bundle_without_plans_runs_on_the_cpu_without_a_word(bundle, monkeypatch):
    monkeypatch.setattr(torch_session, "has_cuda", lambda: pytest.fail("to look for CUDA imports torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(open_vision_engine(bundle), OnnxRuntimeEngine)


def test_torch_is_not_looked_at_where_another_engine_opens(in_bfloat16, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(torch_session, "has_cuda", lambda: pytest.fail("to look for CUDA imports torch"))
    opened = object()
    monkeypatch.setitem(engines._CREATORS, "onnxruntime-cuda", lambda _bundle, _settings: opened)
    assert open_vision_engine(in_bfloat16) is opened


def test_a_bf16_graph_runs_in_torch_on_the_cpu_without_a_word(in_bfloat16, monkeypatch):
    monkeypatch.setattr(torch_session, "has_cuda", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = open_vision_engine(in_bfloat16)
    assert isinstance(engine, torch_session.TorchEngine)
    assert engine.view_device == "cpu"


def test_a_bf16_graph_is_refused_by_onnxruntime_on_the_cpu_with_what_to_do(in_bfloat16):
    with pytest.raises(EngineError, match="is bf16, and ONNX Runtime has no kernels for bfloat16 on a CPU") as caught:
        open_vision_engine(in_bfloat16, "onnxruntime")
    advice = "take the engine torch (pip install 'hivtp[torch]') or one for a GPU, or export the bundle with"
    assert f"{advice} --vision-precision fp32 or fp16" in str(caught.value)
    done = hivtp_run(in_bfloat16.folder, "what", "--engine", "onnxruntime")
    assert (done.returncode, done.stderr) == (1, f"hivtp-run: {caught.value}\n")


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_a_bf16_graph_without_torch_says_what_to_install(in_bfloat16, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch_session, "has_cuda", lambda: False)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*pip install 'hivtp\[torch\]'"):
        open_vision_engine(in_bfloat16)


def test_torch_that_is_not_installed_sees_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not torch_session.has_cuda()


@pytest.mark.parametrize(
    ("broken", "taken"),
    [
        ((), "tensorrt"),
        (("tensorrt",), "onnxruntime-cuda"),
        (("tensorrt", "onnxruntime-cuda"), "torch-cuda"),
        (("tensorrt", "onnxruntime-cuda", "torch-cuda"), "torch"),
    ],
)
def test_a_bf16_graph_tries_every_gpu_before_torch_on_the_cpu(in_bfloat16, monkeypatch, broken, taken):
    add(in_bfloat16)
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(torch_session, "has_cuda", lambda: True)

    def creator(name):
        def create(_bundle, _settings):
            if name in broken:
                raise EngineError(f"{name} does not work")
            return name

        return create

    monkeypatch.setattr(engines, "_CREATORS", {name: creator(name) for name in engines._CREATORS})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_vision_engine(in_bfloat16) == taken
    assert [str(warning.message).rpartition(": ")[2] for warning in caught] == [
        f"{name} does not work" for name in broken
    ]


def test_a_pipeline_answers_with_a_bf16_graph(in_bfloat16, exact_bundle, photo):
    expected = Pipeline.load(exact_bundle).generate("what", [photo], max_new_tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        answer = Pipeline.load(in_bfloat16.folder).generate("what", [photo], max_new_tokens=8)
    assert answer.num_kept_tokens == expected.num_kept_tokens
    assert len(answer.token_ids) > 0


@pytest.mark.usefixtures("tensorrt_on_h200")
def test_a_plan_that_fits_is_taken(bundle):
    add(bundle)
    for name in ("auto", "tensorrt"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine = open_vision_engine(bundle, name, EngineSettings())
        assert isinstance(engine, session.TensorRtEngine)
        np.testing.assert_array_equal(engine.run({"x": np.ones((1, 3), np.float32)})["double"], [[2, 2, 2]])


@pytest.mark.parametrize("damage", ["another GPU", "truncated", "altered", "refused"])
@pytest.mark.usefixtures("tensorrt_on_h200")
def test_a_plan_that_cannot_run_is_passed_over_with_a_warning_that_says_why(bundle, damage):
    content = b"refused" if damage == "refused" else b"content"
    file = add(bundle, content, gpu=RTX if damage == "another GPU" else H200)
    if damage == "truncated":
        file.write_bytes(b"cont")
    if damage == "altered":
        file.write_bytes(b"foreign")
    reasons = {
        "another GPU": "was built for NVIDIA GeForce RTX 5090",
        "truncated": "has 4 bytes instead of 7",
        "altered": "its sha256 differs",
        "refused": "cannot load the plan: the header is wrong",
    }
    with pytest.warns(EngineWarning, match=f"engine tensorrt cannot run .*, trying onnxruntime: .*{reasons[damage]}"):
        assert isinstance(open_vision_engine(bundle), OnnxRuntimeEngine)
    with pytest.raises(EngineError, match=reasons[damage]):
        open_vision_engine(bundle, "tensorrt")


@pytest.mark.usefixtures("no_tensorrt")
def test_a_plan_without_its_library_is_passed_over_with_the_extra_that_brings_it(bundle):
    add(bundle)
    add(bundle, library="tensorrt-rtx", library_version="1.7.1.116", is_portable=True)
    with pytest.warns(EngineWarning) as caught:
        assert isinstance(open_vision_engine(bundle), OnnxRuntimeEngine)
    first, second = (str(warning.message) for warning in caught)
    assert "trying tensorrt-rtx: tensorrt is not installed; install it with: pip install 'hivtp[tensorrt]'" in first
    assert "trying onnxruntime: tensorrt_rtx is not installed" in second
    with pytest.raises(MissingExtraError, match="tensorrt is not installed"):
        open_vision_engine(bundle, "tensorrt")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_work_is_passed_over_with_a_warning(bundle, monkeypatch):
    # As if onnxruntime-gpu were installed. The session is the real one, which has no CUDA.
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "check_cuda_package", lambda: None)
    warnings.filterwarnings("ignore", "Specified provider", UserWarning)
    with pytest.warns(
        EngineWarning, match="engine onnxruntime-cuda cannot run .*, trying onnxruntime: .*not start CUDA"
    ):
        engine = open_vision_engine(bundle)
    assert isinstance(engine, OnnxRuntimeEngine)


@pytest.mark.usefixtures("no_tensorrt")
def test_an_engine_that_is_named_is_taken_or_refused(bundle):
    assert isinstance(open_vision_engine(bundle, "onnxruntime"), OnnxRuntimeEngine)
    with pytest.raises(EngineError, match="'abacus'; there are auto, onnxruntime, onnxruntime-cuda, tensorrt, tensor"):
        open_vision_engine(bundle, "abacus")
    with pytest.raises(MissingExtraError, match="tensorrt_rtx is not installed"):
        open_vision_engine(bundle, "tensorrt-rtx")


@pytest.mark.usefixtures("no_tensorrt")
def test_a_pipeline_says_why_it_does_not_use_the_plan_and_answers_all_the_same(bundle, photo):
    expected = Pipeline.load(bundle.folder).generate("what", [photo], max_new_tokens=8)
    add(bundle)
    with pytest.warns(EngineWarning, match="tensorrt is not installed"):
        pipeline = Pipeline.load(bundle.folder)
    assert pipeline.generate("what", [photo], max_new_tokens=8).token_ids == expected.token_ids
    with pytest.raises(MissingExtraError):
        Pipeline.load(bundle.folder, engine="tensorrt")


def test_the_command_warns_in_one_line_and_answers(bundle):
    # A version that nobody has installed, so that what this machine holds plays no part.
    add(bundle, library="tensorrt-rtx", library_version="0.1", is_portable=True)
    done = hivtp_run(bundle.folder, "what", "--max-new-tokens", 2)
    assert done.returncode == 0
    assert done.stderr.startswith("hivtp-run: the engine tensorrt-rtx cannot run")
    assert done.stderr.count("\n") == 1
    done = hivtp_run(bundle.folder, "what", "--max-new-tokens", 2, "--engine", "onnxruntime")
    assert (done.returncode, done.stderr) == (0, "")
    done = hivtp_run(bundle.folder, "what", "--engine", "abacus")
    assert done.returncode == 2
    assert "abacus" in done.stderr
