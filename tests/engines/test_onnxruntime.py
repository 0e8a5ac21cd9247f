from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hivtp.engines import EngineSettings, create_engine
from hivtp.engines.onnxruntime import run_errors
from hivtp_ops.errors import EngineError, MissingExtraError, OutOfMemoryError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.base import Engine

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`x` [rows, 2] to `product` [rows, 3] and `sum` [1], with its weight in a file beside it."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["sum"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])]
    outputs = [
        helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", 3]),
        helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
    ]
    weight = numpy_helper.from_array(WEIGHT, "weight")
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, outputs, [weight]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    file = tmp_path_factory.mktemp("engine") / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return file


@pytest.fixture(scope="module")
def engine(graph: Path) -> Engine:
    return create_engine("onnxruntime", graph)


def test_a_graph_gives_every_output_by_name(engine):
    x = np.array([[1, 2], [3, 4]], np.float32)
    outputs = engine.run({"x": x})
    assert engine.output_names == ("product", "sum") == tuple(outputs)
    np.testing.assert_array_equal(outputs["product"], x @ WEIGHT)
    assert outputs["sum"] == (x @ WEIGHT).sum()


def test_several_threads_run_one_engine(engine):
    inputs = [np.full((rows, 2), rows, np.float32) for rows in range(1, 33)]
    with ThreadPoolExecutor(4) as threads:
        products = list(threads.map(lambda x: engine.run({"x": x})["product"], inputs))
    for x, product in zip(inputs, products, strict=True):
        np.testing.assert_array_equal(product, x @ WEIGHT)


def test_the_number_of_threads_is_the_one_asked_for(graph):
    engine = create_engine("onnxruntime", graph, EngineSettings(num_threads=1))
    assert engine.session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("num_threads", [0, -1, 513, 99_999, True, 1.0, "1"])
def test_a_number_of_threads_that_cannot_be_is_refused(num_threads):
    with pytest.raises(SettingsError, match=f"num_threads must be a whole number from 1 to 512, not {num_threads!r}"):
        EngineSettings(num_threads)


def test_an_unknown_engine_is_refused_with_those_that_there_are(graph):
    with pytest.raises(
        EngineError, match="no engine is named 'abacus' that runs ONNX; there are onnxruntime and onnxruntime-cuda"
    ):
        create_engine("abacus", graph)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "x"),
        ({"y": np.zeros((1, 2), np.float32)}, "y"),
        ({"x": np.zeros((1, 2), np.float32), "y": np.zeros(1, np.float32)}, "y"),
        ({"x": np.zeros((1, 3), np.float32)}, "x.*Got: 3 Expected: 2"),
        ({"x": np.zeros(2, np.float32)}, "rank for input: x"),
        ({"x": np.zeros((1, 2), np.float64)}, "double"),
        ({"x": np.array([["a", "b"]])}, "string|tensor"),
    ],
    ids=["none", "unknown", "one too many", "shape", "rank", "dtype", "text"],
)
def test_inputs_that_do_not_fit_are_an_engine_error_that_names_them(engine, inputs, message):
    with pytest.raises(EngineError, match=f"(?s)onnxruntime failed while running the vision graph: .*({message})"):
        engine.run(inputs)


def test_a_missing_package_is_named_with_the_command_that_installs_it(graph, monkeypatch):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*pip install 'hivtp\[cpu\]'") as caught:
        create_engine("onnxruntime", graph)
    assert (caught.value.package, caught.value.extra) == ("onnxruntime", "cpu")
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("damage", ["absent", "empty", "no graph", "cut", "no weights", "short weights"])
def test_a_graph_that_cannot_be_loaded_is_an_engine_error_that_names_the_file(graph, tmp_path, damage):
    folder = shutil.copytree(graph.parent, tmp_path / "engine")
    file, weights = folder / graph.name, folder / "model.onnx.data"
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage in ("no weights", "short weights"):
        weights.unlink()
        if damage == "short weights":
            weights.write_bytes(b"\0")
    else:
        file.write_bytes({"empty": b"", "no graph": b"not a graph", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(EngineError, match=r"onnxruntime failed while loading .*model\.onnx"):
        create_engine("onnxruntime", file)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 1000"),
        RuntimeError("Available memory of 10 is smaller than requested bytes of 1000"),
        RuntimeError("CUDA failure 2: out of memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_is_told_from_other_failures(error):
    with (
        pytest.raises(OutOfMemoryError, match="memory ran out while running the decoder"),
        run_errors("running the decoder"),
    ):
        raise error
    with (
        pytest.raises(EngineError, match="onnxruntime failed while running the decoder: broken"),
        run_errors("running the decoder"),
    ):
        raise RuntimeError("broken")


def test_memory_that_truly_runs_out_is_an_out_of_memory_error(tmp_path):
    """A graph of a kilobyte can ask for any amount."""
    node = helper.make_node("ConstantOfShape", ["shape"], ["y"])
    inputs = [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph([node], "huge", inputs, outputs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, tmp_path / "huge.onnx")
    engine = create_engine("onnxruntime", tmp_path / "huge.onnx")
    with pytest.raises(OutOfMemoryError):
        engine.run({"shape": np.array([2**50], np.int64)})


def test_nobody_is_told_how_it_is_used(graph: Path, tmp_path: Path) -> None:
    """onnxruntime keeps a database of reports in the user's home, which shows whether it makes any."""
    script = f"""
import sys, time
from pathlib import Path
from hivtp.engines import create_engine
create_engine("onnxruntime", Path({str(graph)!r}))
time.sleep(1)
"""
    variables = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", script], env=variables, check=True, timeout=120)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
