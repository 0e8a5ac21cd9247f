"""Plans in bundles. The tests that build need TensorRT for RTX, which builds without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, SamplingParams, VisionOptions
from hivtp.engines.bundle import PLANS_FOLDER, Bundle
from hivtp.engines.gpu import Gpu, find_gpu
from hivtp.engines.tensorrt.builder import BuildSettings, BuiltPlan, build_plan
from hivtp.engines.tensorrt.library import load_library
from hivtp.engines.tensorrt.plan import has_plans, read_plan
from hivtp.engines.tensorrt.plan_record import PlanRecord
from hivtp.engines.tensorrt.profile import TileProfile
from hivtp.export import plan as plan_module
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.cli.plan import make_parser, plan_summary, settings_from
from hivtp.export.exporter import export_bundle
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima, first_fp8_layer
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.plan import Builder, PlanSettings, export_plan
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.samples import sample_pixels
from hivtp.main import export, main
from hivtp_ops import PRESETS, PruningSpec, tensorrt_plugin
from hivtp_ops.errors import BundleError, EngineError, EngineWarning, KernelError, MissingExtraError
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import H200, make_record

RTX = PlanSettings("tensorrt-rtx")


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "bundle"
    return export_bundle(tiny_checkpoint, folder, ExportSettings(vision_precision="fp16"), is_quiet=True).folder


@pytest.fixture(scope="session")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("next") / "checkpoint", family="llava_next")


@pytest.fixture
def bundle(half_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half_bundle, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which plans are this machine's own is recorded for the test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def parse(*arguments: str) -> PlanSettings:
    return settings_from(make_parser("hivtp plan").parse_args(["bundle", *arguments]))


def test_options_become_settings(tmp_path: Path) -> None:
    assert parse("--engine", "tensorrt") == PlanSettings("tensorrt")
    options = ["--tiles", "1:1:4", "--tiles", "5", "--workspace-gib", "0.5", "--optimization-level", "5", "--no-tf32"]
    assert parse("--engine", "tensorrt-rtx", *options, "--timing-cache", str(tmp_path)) == PlanSettings(
        "tensorrt-rtx",
        profiles=(TileProfile(1, 1, 4), TileProfile(5, 5, 5)),
        workspace_bytes=2**29,
        optimization_level=5,
        allows_tf32=False,
        timing_cache=tmp_path,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "1:2"], "is not a profile of tiles"),
        (["--tiles", "5"], "leave out 1 tiles"),
        (["--optimization-level", "6"], "the optimization level is 6; give 0 to 5"),
        (["--workspace-gib", "0"], r"--workspace-gib is 0\.0; give more than 0"),
        (["--workspace-gib", "nan"], "--workspace-gib is nan; give more than 0"),
        (["--workspace-gib", "inf"], "--workspace-gib is inf; give more than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        parse("--engine", "tensorrt", *arguments)


def test_an_int8_graph_is_refused_before_anything_is_exported(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_checkpoint), str(tmp_path / "bundle"), "--vision-precision", "int8", "--engine", "tensorrt"]
    assert export(arguments) == 1
    assert "the int8 vision graph is made for the CPU, and TensorRT cannot take it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("capability", "is_taken"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_fp8_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, is_taken: bool
) -> None:
    gpu = replace(H200, compute_capability=capability)
    monkeypatch.setattr(plan_module, "load_library", fake_gpu.library)
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: gpu)
    assert Builder.find(PlanSettings("tensorrt"), "fp16").gpu == gpu
    if is_taken:
        assert Builder.find(PlanSettings("tensorrt"), "fp8").gpu == gpu
    else:
        with pytest.raises(EngineError, match=r"has no products in fp8, which came with compute capability 8.9"):
            Builder.find(PlanSettings("tensorrt"), "fp8")
    # What is built here may be for others.
    monkeypatch.setattr(plan_module, "load_library", lambda name: fake_gpu.library(name, is_portable=True))
    assert Builder.find(RTX, "fp8").gpu == gpu


def test_a_library_that_needs_a_gpu_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "load_library", fake_gpu.library)
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: None)
    with pytest.raises(EngineError, match="tensorrt builds a plan on the GPU that will run it, and no NVIDIA GPU"):
        Builder.find(PlanSettings("tensorrt"), "fp16")


def test_a_missing_library_is_named_before_anything_is_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    load_library.cache_clear()
    with pytest.raises(MissingExtraError):
        Builder.find(PlanSettings("tensorrt"), "fp16")
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), "--engine", "tensorrt"]) == 1
    assert capsys.readouterr().err.endswith("install it with: pip install 'hivtp[tensorrt]'\n")
    assert list(tmp_path.iterdir()) == []


def test_a_summary_says_what_was_compared_and_what_was_not(half_bundle: Path) -> None:
    bundle = Bundle.open(half_bundle)
    checked = {
        "is_done": True,
        "relative_error": 2e-3,
        "importance_error": 1e-6,
        "kept_jaccard": 0.99,
        "tolerance": {"relative_error": 1e-2},
    }
    text = plan_summary(Path("x.plan"), make_record(bundle, verification=checked, gpu=H200))
    assert "tensorrt 11.4.0.106, for NVIDIA H200 (compute capability 9.0" in text
    assert "relative error 2.0e-03 (allowed 1e-02), kept-token agreement 99.0%" in text
    unchecked = {"is_done": False, "reason": "there was no GPU to run it on"}
    text = plan_summary(Path("x.plan"), make_record(bundle, verification=unchecked, is_portable=True))
    assert "for any RTX GPU since Ampere" in text
    text = plan_summary(Path("x.plan"), make_record(bundle, verification=unchecked, is_portable=True, precision="fp8"))
    assert "for any RTX GPU since Ada" in text
    assert "NOT DONE: there was no GPU to run it on" in text


@pytest.mark.parametrize("is_portable", [True, False])
def test_a_plan_for_other_gpus_need_not_run_on_this_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, is_portable: bool
) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: H200)
    monkeypatch.setattr(plan_module, "_offer_kernel", lambda _builder: None)
    monkeypatch.setattr(plan_module, "load_library", lambda name: fake_gpu.library(name, is_portable=is_portable))
    # The stand-in refuses to load what bears this name.
    built = BuiltPlan(memoryview(b"refused"), "function", b"")
    monkeypatch.setattr(plan_module, "build_plan", lambda *_arguments: built)
    if is_portable:
        _, record = export_plan(bundle, RTX, is_quiet=True)
        assert not record.verification["is_done"]
        assert "the GPU here cannot run it" in record.verification["reason"]
        return
    with pytest.raises(EngineError, match="cannot load the plan"):
        export_plan(bundle, PlanSettings("tensorrt"), is_quiet=True)
    assert not (bundle / PLANS_FOLDER).exists()


@pytest.mark.parametrize(
    ("library", "gpu", "offers"),
    [
        ("tensorrt", H200, True),
        ("tensorrt", replace(H200, compute_capability=(7, 5)), False),
        ("tensorrt", None, False),
        ("tensorrt-rtx", H200, False),
    ],
)
def test_the_kernel_is_offered_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, library: str, gpu: Gpu | None, offers: bool
) -> None:
    calls = []
    monkeypatch.setattr(tensorrt_plugin, "register_plugin", lambda: calls.append(library))
    plan_module._offer_kernel(Builder(fake_gpu.library(library), gpu))
    assert bool(calls) == offers


def test_a_kernel_that_cannot_be_compiled_leaves_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KernelError("no compiler here")

    monkeypatch.setattr(tensorrt_plugin, "register_plugin", fail)
    with pytest.warns(EngineWarning, match="no compiler here"):
        plan_module._offer_kernel(Builder(fake_gpu.library("tensorrt"), H200))


def test_what_was_measured_is_kept_for_the_next_build(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: H200)
    monkeypatch.setattr(plan_module, "_offer_kernel", lambda _builder: None)
    monkeypatch.setattr(plan_module, "load_library", fake_gpu.library)
    monkeypatch.setattr(plan_module, "_verify", lambda *_arguments: {"is_done": True})
    known = []

    def build_plan(_library: object, _graph: Path, _settings: object, cache: bytes, _progress: object) -> BuiltPlan:
        known.append(cache)
        return BuiltPlan(memoryview(b"plan"), "function", cache + b"measured ")

    monkeypatch.setattr(plan_module, "build_plan", build_plan)
    settings = PlanSettings("tensorrt", timing_cache=tmp_path / "timing")
    for _ in range(3):
        export_plan(bundle, settings, is_quiet=True)
    assert known == [b"", b"measured ", b"measured measured "]
    # A place that cannot be written costs the cache, and not the plan.
    (tmp_path / "file").write_text("")
    with pytest.warns(EngineWarning) as warned:
        export_plan(bundle, PlanSettings("tensorrt", timing_cache=tmp_path / "file"), is_quiet=True)
    assert "cannot be written" in str(warned[-1].message)
    assert has_plans(Bundle.open(bundle), "tensorrt")


def test_a_bundle_without_a_decoder_takes_a_plan(
    bare_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bare_bundle, tmp_path / "bundle")
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: H200)
    monkeypatch.setattr(plan_module, "_offer_kernel", lambda _builder: None)
    monkeypatch.setattr(plan_module, "load_library", fake_gpu.library)
    monkeypatch.setattr(plan_module, "_verify", lambda *_arguments: {"is_done": True})
    built = BuiltPlan(memoryview(b"plan"), "function", b"")
    monkeypatch.setattr(plan_module, "build_plan", lambda *_arguments: built)
    settings = PlanSettings("tensorrt", allows_tf32=False, timing_cache=tmp_path / "timing")
    export_plan(folder, settings, is_quiet=True)
    assert has_plans(Bundle.open(folder, check_hashes=True), "tensorrt")


def test_where_a_plan_is_compared_onnxruntime_is_asked_for_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "load_library", lambda name: fake_gpu.library(name, is_portable=True))
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: H200)
    assert Builder.find(RTX, "fp16").gpu == H200
    monkeypatch.setattr(plan_module, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*hivtp\[cpu\]"):
        Builder.find(RTX, "fp16")
    # Without a GPU it is not compared.
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: None)
    assert Builder.find(RTX, "fp16").gpu is None


def test_a_plan_that_was_built_is_this_machines_own(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "find_gpu", lambda _extra: H200)
    monkeypatch.setattr(plan_module, "_offer_kernel", lambda _builder: None)
    monkeypatch.setattr(plan_module, "load_library", fake_gpu.library)
    monkeypatch.setattr(plan_module, "_verify", lambda *_arguments: {"is_done": True})
    built = BuiltPlan(memoryview(b"plan"), "function", b"")
    monkeypatch.setattr(plan_module, "build_plan", lambda *_arguments: built)
    export_plan(bundle, PlanSettings("tensorrt", timing_cache=tmp_path / "timing"), is_quiet=True)
    assert read_plan(Bundle.open(bundle), fake_gpu.library(), H200)[1] == b"plan"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(EngineError, match="was not built by this machine"):
        read_plan(Bundle.open(bundle), fake_gpu.library(), H200)


# From here on plans are built.


def read_record(bundle: Path) -> PlanRecord:
    [sidecar] = (bundle / PLANS_FOLDER).glob("*.json")
    return PlanRecord.from_json(sidecar.read_text())


@pytest.mark.tensorrt
def test_a_plan_is_built_into_a_bundle_with_all_that_its_sidecar_says(bundle: Path) -> None:
    settings = PlanSettings("tensorrt-rtx", profiles=(TileProfile(1, 1, 4), TileProfile(5, 5, 5)))
    file, record = export_plan(bundle, settings, is_quiet=True)
    assert read_record(bundle) == record
    version = load_library("tensorrt-rtx").version
    assert file.name == f"tensorrt-rtx-{version}-any-rtx.plan"
    assert file.stat().st_size == record.plan.num_bytes > 100_000
    assert (record.library, record.library_version, record.is_portable) == ("tensorrt-rtx", version, True)
    assert (record.profiles, record.precision, record.pruning) == (("1:1:4", "5:5:5"), "fp16", "function")
    assert set(record.graph) == {"vision/model.onnx", "vision/model.onnx.data"}
    if find_gpu() is None:
        assert record.verification == {"is_done": False, "reason": "there was no GPU to run it on"}
        with pytest.warns(EngineWarning, match="needs an NVIDIA GPU"):
            Pipeline.load(bundle)
    assert Bundle.open(bundle, check_hashes=True)


@pytest.mark.tensorrt
def test_the_command_exports_and_builds_and_builds_again(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    options = ["--engine", "tensorrt-rtx", "--tiles", "1:1:2"]
    assert export([str(tiny_checkpoint), str(folder), "--vision-precision", "fp16", "--quiet", *options[:2]]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "next: hivtp run" in printed.out
    assert "fp16" in printed.out
    assert "tiles     1:1:8" in printed.out
    assert main(["plan", str(folder), "--quiet", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "fp16" in printed.out
    assert "tiles     1:1:2" in printed.out
    assert main(["plan", str(folder), "--engine", "tensorrt-rtx"]) == 0
    printed = capsys.readouterr()
    assert "tiles     1:1:8" in printed.out
    assert "[3/3] Plan against the ONNX graph: done" in printed.err
    assert read_record(folder).profiles == ("1:1:8",)


@pytest.mark.tensorrt
def test_a_float32_graph_is_named_in_a_warning_unless_tf32_is_off(pruned_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned_bundle, tmp_path / "bundle")
    with pytest.warns(EngineWarning, match="float32, and TensorRT runs its matrix products in TF32"):
        export_plan(folder, RTX, is_quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = PlanSettings("tensorrt-rtx", allows_tf32=False, workspace_bytes=2**30, optimization_level=0)
        export_plan(folder, exact, is_quiet=True)
    record = read_record(folder)
    assert (record.allows_tf32, record.workspace_bytes, record.optimization_level) == (False, 2**30, 0)


@pytest.mark.tensorrt
def test_an_altered_graph_is_refused(bundle: Path) -> None:
    weights = bundle / "vision" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        export_plan(bundle, RTX, is_quiet=True)
    assert not (bundle / PLANS_FOLDER).exists()


@pytest.mark.tensorrt
@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_graph_that_tensorrt_cannot_read_is_an_engine_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"tensorrt-rtx .* cannot (take|build a plan of) .*model\.onnx"):
        build_plan(load_library("tensorrt-rtx"), tmp_path / "model.onnx", BuildSettings((TileProfile(1, 1, 1),)))


@pytest.mark.tensorrt
def test_operators_that_tensorrt_lacks_are_named_by_node(tmp_path: Path) -> None:
    pixels = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, ["tiles", 3, 8, 8])
    scales = [onnx.helper.make_tensor_value_info(f"scale{index}", onnx.TensorProto.FLOAT, []) for index in range(5)]
    nodes = [
        onnx.helper.make_node(
            "DynamicQuantizeLinear",
            ["pixel_values"],
            [f"whole{index}", scale.name, f"zero{index}"],
            name=f"round.{index}",
        )
        for index, scale in enumerate(scales)
    ]
    opsets = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "graph", [pixels], scales), opset_imports=opsets, ir_version=10
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineError) as caught:
        build_plan(load_library("tensorrt-rtx"), tmp_path / "model.onnx", BuildSettings((TileProfile(1, 1, 1),)))
    message = str(caught.value)
    assert "node 'round.0' (DynamicQuantizeLinear): UNSUPPORTED_NODE" in message
    assert "more" in message


@pytest.mark.tensorrt
@pytest.mark.parametrize(("spec", "node"), [(None, "norm1.uint8"), (PruningSpec(), "attention.queries.matmul")])
def test_an_int8_graph_is_refused_by_its_first_node(
    tiny_checkpoint: Path, tmp_path: Path, spec: PruningSpec | None, node: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    save_model(build_vision_graph(checkpoint, spec and spec.resolve(6), "int8"), tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=rf"tensorrt-rtx .* cannot take .*node 'layers\.0\.{node}'"):
        build_plan(load_library("tensorrt-rtx"), tmp_path / "model.onnx", BuildSettings((TileProfile(1, 1, 1),)))


@pytest.mark.tensorrt
def test_progress_rises_to_the_end(half_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    graph = Bundle.open(half_bundle).vision_file
    settings = BuildSettings((TileProfile(1, 1, 2),))
    build_plan(load_library("tensorrt-rtx"), graph, settings, on_progress=lambda done, all_: seen.append((done, all_)))
    assert seen == sorted(seen)
    [num_steps] = {total for _, total in seen}
    assert num_steps > 1
    assert (seen[0], seen[-1]) == ((0, num_steps), (num_steps, num_steps))


@pytest.mark.tensorrt
def test_ctrl_c_stops_a_build_and_leaves_nothing(bundle: Path) -> None:
    code = """
import os, signal, sys
from hivtp.export import plan
from hivtp.main import main

# At every step, as somebody does who is in a hurry.
plan.Progress.update = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(["plan", sys.argv[1], "--engine", "tensorrt-rtx", "--quiet"]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\nhivtp plan: stopped\n")
    assert not (bundle / PLANS_FOLDER).exists()


@pytest.mark.tensorrt
def test_a_bundle_is_whole_where_its_plan_fails(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr(plan_module, "build_plan", fail)
    folder = tmp_path / "bundle"
    arguments = [str(tiny_checkpoint), str(folder), "--vision-precision", "fp16", "--engine", "tensorrt-rtx", "--quiet"]
    assert export(arguments) == 1
    assert capsys.readouterr().err == "hivtp-export: the bundle is whole, but has no plan: out of memory\n"
    assert not has_plans(Bundle.open(folder, check_hashes=True), "tensorrt-rtx")


def write_graph(folder: Path, file: Path, spec: PruningSpec | None, precision: str, kind: str = "vision") -> Path:
    checkpoint = Checkpoint.open(folder)
    resolved = None if spec is None else spec.resolve(VisionShape.of(checkpoint.config).num_layers)
    maxima = None
    if precision == "fp8":
        pixel_values = sample_pixels(1, checkpoint.config.vision_config.image_size)
        first = first_fp8_layer(resolved, VisionShape.of(checkpoint.config))
        maxima = activation_maxima(checkpoint, first, [pixel_values], file.parent)
    save_model(build_vision_graph(checkpoint, resolved, precision, kind, maxima), file)
    return file


def build(graph: Path) -> BuiltPlan:
    built = build_plan(load_library("tensorrt-rtx"), graph, BuildSettings((TileProfile(1, 1, 5),)))
    assert built.content.nbytes > graph.with_name(f"{graph.name}.data").stat().st_size
    return built


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(
    "preset",
    [
        name if name in ("paper", "64", "none") else pytest.param(name, marks=pytest.mark.slow)
        for name in (*PRESETS, "none")
    ],
)
def test_every_preset_of_both_families_is_built_for_any_number_of_tiles(
    tiny_checkpoint: Path, next_checkpoint: Path, tmp_path: Path, preset: str, family: str, precision: str
) -> None:
    folder = tiny_checkpoint if family == "llava" else next_checkpoint
    spec = None if preset == "none" else PruningSpec.preset(preset, (8, 8))
    built = build(write_graph(folder, tmp_path / "model.onnx", spec, precision))
    assert built.pruning == (None if spec is None else "function")


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", ["paper", "192"])
def test_a_siglip_tower_of_27_x_27_patches_is_built(tmp_path: Path, preset: str, precision: str) -> None:
    vision = {"image_size": 384, "patch_size": 14}
    folder = make_checkpoint(tmp_path / "checkpoint", tower="siglip", vision=vision)
    spec = PruningSpec.preset(preset, (27, 27))
    assert build(write_graph(folder, tmp_path / "model.onnx", spec, precision)).pruning == "function"


@pytest.mark.tensorrt
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("preset", ["192", "none"])
def test_a_graph_in_fp8_is_built(
    tiny_checkpoint: Path, next_checkpoint: Path, tmp_path: Path, preset: str, family: str
) -> None:
    folder = tiny_checkpoint if family == "llava" else next_checkpoint
    spec = None if preset == "none" else PruningSpec.preset(preset, (8, 8))
    built = build(write_graph(folder, tmp_path / "model.onnx", spec, "fp8"))
    assert built.pruning == (None if spec is None else "function")


@pytest.mark.tensorrt
def test_an_encoder_graph_is_built(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = PruningSpec()
    assert build(write_graph(tiny_checkpoint, tmp_path / "model.onnx", spec, "fp16", "encoder")).pruning is None


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_a_vit_l_of_real_size_is_built(tmp_path: Path, precision: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", "vit-l-0.3b")
    graph = write_graph(folder, tmp_path / "model.onnx", PruningSpec.preset("192"), precision)
    started = time.perf_counter()
    built = build(graph)
    print(f"{precision}: {built.content.nbytes / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")  # noqa: T201
    assert built.pruning == "function"


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_plan_of_this_gpu_gives_what_the_graph_gives(bundle: Path, photo: Path) -> None:
    sampling = SamplingParams(max_new_tokens=8)
    expected = Pipeline.load(bundle, vision=VisionOptions(engine="onnxruntime")).generate("what", [photo], sampling)
    settings = PlanSettings("tensorrt", profiles=(TileProfile(1, 1, 4), TileProfile(5, 5, 5)))
    _, record = export_plan(bundle, settings, is_quiet=True)
    assert record.verification["is_done"]
    assert record.verification["tiles"] == [1, 5]
    for uses_cuda_graph in (False, True):
        vision = VisionOptions(engine="tensorrt", uses_cuda_graph=uses_cuda_graph, cache_bytes=0)
        pipeline = Pipeline.load(bundle, vision=vision)
        # A CUDA graph is recorded after the first run and replayed from the second on.
        for _ in range(3):
            answer = pipeline.generate("what", [photo], sampling)
            assert answer.num_kept_tokens == expected.num_kept_tokens
            assert answer.token_ids == expected.token_ids
