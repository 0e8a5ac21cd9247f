from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hivtp_ops import PRESETS, PruningSpec, op
from hivtp_ops.errors import KernelError, MissingExtraError
from hivtp_ops.kernel import hierarchical_prune_kernel
from hivtp_ops.tensorrt_plugin import register_plugin
from tests.hivtp_ops.brute_force import PAPER_GRID

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("tensorrt_plugin_life.py")
PAIRS = [*((PAPER_GRID, spec) for spec in PRESETS.values()), ((20, 20), PruningSpec(global_ratio=0.7, window=3))]

# What the bindings import from the libraries, by `nm -D`. It is enough for all that TensorRT does in Python.
STUBBED = [
    *(f"createInfer{name}_INTERNAL" for name in ("Builder", "Refitter", "Runtime")),
    *(f"createNvOnnx{name}_INTERNAL" for name in ("Parser", "ParserRefitter")),
    *("getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A folder with libraries that do nothing, for bindings that were installed without TensorRT's libraries."""
    if importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("neither tensorrt nor its bindings (tensorrt_cu13_bindings) are installed")
    folder = tmp_path_factory.mktemp("stubs")
    if importlib.util.find_spec("tensorrt_libs") is not None:
        return folder
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler to make the stubs with")
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBBED), encoding="utf-8")
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        for major in (10, 11):
            file = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", folder / file, source]
            subprocess.run(command, check=True)
    return folder


@pytest.mark.tensorrt
@pytest.mark.parametrize(("grid", "spec"), PAIRS, ids=str)
def test_tensorrt_takes_the_definitions_and_gets_the_kernel(stubs, grid, spec):
    attributes = op.attributes(grid, spec)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(stubs), os.environ.get("LD_LIBRARY_PATH")))),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, os.environ.get("PYTHONPATH", "")))),
    }
    arguments = [sys.executable, SCRIPT, json.dumps(attributes), str(spec.capacity(grid))]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    life = json.loads(done.stdout.splitlines()[-1])
    kernel = hierarchical_prune_kernel(grid, spec)
    assert life == {
        "plugin": "hivtp::HierarchicalPrune",
        "fields": {name: "FLOAT64" if name == "global_ratio" else "INT64" for name in op.ATTRIBUTES},
        "attributes": attributes,
        "dtypes": ["DataType.INT64", "DataType.INT64"],
        "ranks": [2, 1],
        "formats": [
            "DataType.FLOAT TensorFormat.LINEAR",
            "DataType.INT64 TensorFormat.LINEAR",
            "DataType.INT64 TensorFormat.LINEAR",
        ],
        "tactics": [],
        "is_block_per_tile": True,
        "launch": {"block_x": kernel.num_threads},
        "num_extra_arguments": 0,
        "kernel": "hierarchical_prune",
        "program": f"compute_80\n{kernel.source}",
    }


def test_attributes_of_the_plugin_are_those_of_the_op():
    # The order is that of the op's attributes, which the parser keeps; TensorRT passes them by position.
    assert op.ATTRIBUTES == ("rows", "cols", "regions", "global_ratio", "window", "keep")
    assert f"{op.PLUGIN_NAMESPACE}::{op.NAME}" == "hivtp::HierarchicalPrune"


def test_without_tensorrt_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed.*hivtp\[tensorrt\]"):
        register_plugin()


def test_without_nvrtc_registering_fails_before_anything_is_registered(monkeypatch):
    tensorrt, plugin = types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    tensorrt.plugin = plugin
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="cuda-bindings"):
        register_plugin()
