"""Which engine runs the vision graph: the one that is named, or the first that works."""

from __future__ import annotations

import shutil
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hivtp import Pipeline, SamplingParams, VisionOptions, engines
from hivtp.engines import EngineSettings, onnxruntime_cuda, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import OnnxRuntimeEngine
from hivtp.engines.tensorrt import session
from hivtp.engines.tensorrt.library import load_library
from hivtp.main import main
from hivtp_ops.errors import EngineError, EngineWarning, MissingExtraError
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import H200, RTX, add

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


def test_a_bundle_without_plans_runs_on_the_cpu_without_a_word(bundle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(open_vision_engine(bundle), OnnxRuntimeEngine)


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
    with pytest.raises(EngineError, match="'abacus'; there are auto, onnxruntime, openvino, onnxruntime-cuda"):
        open_vision_engine(bundle, "abacus")
    with pytest.raises(MissingExtraError, match="tensorrt_rtx is not installed"):
        open_vision_engine(bundle, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("broken", "taken"),
    [
        ((), "tensorrt"),
        (("tensorrt",), "tensorrt-rtx"),
        (("tensorrt", "tensorrt-rtx"), "onnxruntime-cuda"),
        (("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"), "onnxruntime"),
    ],
)
def test_every_gpu_is_tried_before_the_cpu(bundle, monkeypatch, broken, taken):
    add(bundle)
    add(bundle, library="tensorrt-rtx", library_version="1.7.1.116", is_portable=True)
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)

    def creator(name):
        def create(_bundle, _settings, _trust_plans):
            if name in broken:
                raise EngineError(f"{name} does not work")
            return name

        return create

    monkeypatch.setattr(engines, "_CREATORS", {name: creator(name) for name in engines._CREATORS})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_vision_engine(bundle) == taken
    assert [str(warning.message).rpartition(": ")[2] for warning in caught] == [
        f"{name} does not work" for name in broken
    ]


def test_where_nothing_works_the_last_error_is_raised(bundle, monkeypatch):
    def fail(*_arguments):
        raise EngineError("not even the CPU")

    monkeypatch.setattr(engines, "_CREATORS", dict.fromkeys(engines._CREATORS, fail))
    with pytest.raises(EngineError, match="not even the CPU"):
        open_vision_engine(bundle)


def test_an_int8_graph_stays_on_the_cpu(make_bundle, monkeypatch):
    int8 = Bundle.open(make_bundle(vision_precision="int8"))
    monkeypatch.setattr(onnxruntime_cuda, "has_cuda_provider", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(open_vision_engine(int8), OnnxRuntimeEngine)


def test_an_fp8_graph_runs_on_the_cpu_with_a_warning(fp8_bundle):
    with pytest.warns(EngineWarning, match="onnxruntime rounds to fp8 .* build a plan with hivtp plan .* --engine"):
        assert isinstance(open_vision_engine(Bundle.open(fp8_bundle)), OnnxRuntimeEngine)


@pytest.mark.usefixtures("tensorrt_on_h200")
def test_a_plan_of_another_machine_is_code_and_runs_only_where_it_is_trusted(bundle, monkeypatch, tmp_path):
    add(bundle)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    reason = r"was not built by this machine, and a plan is code: say trust_plans=True \(--trust-plans\) if you trust"
    with pytest.warns(EngineWarning, match=f"engine tensorrt cannot run .*, trying onnxruntime: .*{reason}"):
        assert isinstance(open_vision_engine(bundle), OnnxRuntimeEngine)
    with pytest.raises(EngineError, match=reason):
        open_vision_engine(bundle, "tensorrt")
    for name in ("auto", "tensorrt"):
        assert isinstance(open_vision_engine(bundle, name, trust_plans=True), session.TensorRtEngine)
    # To have trusted it once is not to have built it.
    with pytest.raises(EngineError, match=reason):
        open_vision_engine(bundle, "tensorrt")


@pytest.mark.parametrize("trust_plans", [False, True])
def test_a_pipeline_trusts_plans_where_it_is_told_to(bundle, monkeypatch, trust_plans):
    add(bundle)
    seen = []

    def note(_bundle, _settings, trusted):
        seen.append(trusted)
        raise EngineError("no GPU here")

    monkeypatch.setitem(engines._CREATORS, "tensorrt", note)
    with pytest.warns(EngineWarning, match="no GPU here"):
        Pipeline.load(bundle.folder, trust_plans=trust_plans)
    assert seen == [trust_plans]


@pytest.mark.usefixtures("no_tensorrt")
def test_a_pipeline_says_why_it_does_not_use_the_plan_and_answers_all_the_same(bundle, photo):
    sampling = SamplingParams(max_new_tokens=8)
    expected = Pipeline.load(bundle.folder).generate("what", [photo], sampling)
    add(bundle)
    with pytest.warns(EngineWarning, match="tensorrt is not installed"):
        pipeline = Pipeline.load(bundle.folder)
    assert pipeline.generate("what", [photo], sampling).token_ids == expected.token_ids
    with pytest.raises(MissingExtraError):
        Pipeline.load(bundle.folder, vision=VisionOptions(engine="tensorrt"))


def test_the_command_warns_in_one_line_and_answers(bundle, capsys):
    # A version that nobody has installed, so that what this machine holds plays no part.
    add(bundle, library="tensorrt-rtx", library_version="0.1", is_portable=True)
    arguments = ["run", str(bundle.folder), "what", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    message = capsys.readouterr().err
    assert message.startswith("hivtp run: the engine tensorrt-rtx cannot run")
    assert message.count("\n") == 1
    assert main([*arguments, "--vision-engine", "onnxruntime"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*arguments, "--vision-engine", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
