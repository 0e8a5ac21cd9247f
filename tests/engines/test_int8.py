from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hivtp.engines import onnxruntime as engine
from hivtp.engines.int8 import EXACT_PRODUCTS, PROBE, overflows_int8
from hivtp.engines.onnxruntime import open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

CPU_INFO = Path("/proc/cpuinfo")
# Instructions of x86 that add products of 8 bits in 32 bits.
EXACT_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
NUM_ROWS, WIDTH, NUM_CHANNELS = 5, 96, 40
# The largest there are, so that every pair of products is beyond 16 bits.
WEIGHT = np.where(np.arange(NUM_CHANNELS) % 2, -128, 127).astype(np.int8) * np.ones((WIDTH, 1), np.int8)
ACTIVATIONS = np.full((NUM_ROWS, WIDTH), 255, np.uint8)


def test_the_probe_is_what_onnx_writes() -> None:
    values = {"a": TensorProto.UINT8, "b": TensorProto.INT8, "y": TensorProto.INT32}
    shapes = {"a": ["m", "k"], "b": ["k", "n"], "y": ["m", "n"]}
    a, b, y = (helper.make_tensor_value_info(name, dtype, shapes[name]) for name, dtype in values.items())
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "probe", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == PROBE


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPU_INFO.exists(), reason="the system does not name its instructions"
)
def test_processors_without_vnni_overflow_and_others_do_not() -> None:
    flags = next(line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags")).split()
    assert overflows_int8() == (not EXACT_FLAGS & set(flags))


def graph_of(kind: str) -> onnx.ModelProto:
    """One product, in the form of a vision graph, or in that of a decoder in w8a8."""
    weight, scale = numpy_helper.from_array(WEIGHT, "weight"), np.ones(NUM_CHANNELS, np.float32)
    constants = [
        weight,
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(scale, "scales"),
        numpy_helper.from_array(np.array(0, np.uint8), "zero"),
        numpy_helper.from_array(np.zeros(NUM_CHANNELS, np.int8), "zeros"),
    ]
    if kind == "vision":
        source = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", WIDTH])
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["value"], ["rounded", "scale", "middle"]),
            helper.make_node("MatMulInteger", ["rounded", "weight", "middle", "zeros"], ["whole"]),
            helper.make_node("Cast", ["whole"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["scale", "scales"], ["step"]),
            helper.make_node("Mul", ["float", "step"], ["product"]),
        ]
    else:
        source = helper.make_tensor_value_info("value", TensorProto.UINT8, ["rows", WIDTH])
        inputs = ["value", "weight", "one", "scales", "zero"]
        nodes = [helper.make_node("MatMulIntegerToFloat", inputs, ["product"], domain="com.microsoft")]
    product = helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", NUM_CHANNELS])
    graph = helper.make_graph(nodes, "product", [source], [product], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def product(session: onnxruntime.InferenceSession, kind: str, num_rows: int) -> NDArray[np.float32]:
    value = ACTIVATIONS[:num_rows] if kind == "w8a8" else ACTIVATIONS[:num_rows].astype(np.float32)
    [found] = session.run(None, {"value": value})
    return found


# One row goes another way in ONNX Runtime than several.
@pytest.mark.parametrize("num_rows", [1, NUM_ROWS])
@pytest.mark.parametrize("kind", ["vision", "w8a8"])
def test_sessions_multiply_8_bits_exactly_on_every_processor(tmp_path: Path, kind: str, num_rows: int) -> None:
    onnx.save(graph_of(kind), tmp_path / "product.onnx")
    exact = ACTIVATIONS[:num_rows].astype(np.float64) @ WEIGHT.astype(np.float64)
    np.testing.assert_allclose(product(open_session(tmp_path / "product.onnx"), kind, num_rows), exact, rtol=1e-6)
    if overflows_int8():
        plain = onnxruntime.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
        assert np.abs(product(plain, kind, num_rows) - exact).max() > 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("overflows", [False, True])
def test_what_is_slower_is_asked_for_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, overflows: bool
) -> None:
    monkeypatch.setattr(engine, "overflows_int8", lambda: overflows)
    onnx.save(graph_of("vision"), tmp_path / "product.onnx")
    options = open_session(tmp_path / "product.onnx").get_session_options()
    if overflows:
        assert options.get_session_config_entry(EXACT_PRODUCTS) == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry(EXACT_PRODUCTS)


@pytest.mark.parametrize("num_rows", [1, 16, 200])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_blocks_of_int4_and_int8_need_no_such_care(num_bits: int, num_rows: int) -> None:
    # All weights the largest, or all the smallest: what overflows most.
    stored = np.where(np.arange(NUM_CHANNELS) % 2, 0, 2**num_bits - 1).astype(np.uint8)[:, None] * np.ones(
        WIDTH, np.uint8
    )
    packed = stored if num_bits == 8 else stored[:, ::2] | stored[:, 1::2] << 4
    constants = [
        numpy_helper.from_array(packed.reshape(NUM_CHANNELS, WIDTH // 32, -1), "weight"),
        numpy_helper.from_array(np.ones((NUM_CHANNELS, WIDTH // 32), np.float32), "scales"),
    ]
    settings = {"K": WIDTH, "N": NUM_CHANNELS, "bits": num_bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["value", "weight", "scales"], ["product"], domain="com.microsoft", **settings
    )
    source = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", WIDTH])
    result = helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", NUM_CHANNELS])
    graph = helper.make_graph([node], "blocks", [source], [result], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sign in (1, -1):
        value = np.full((num_rows, WIDTH), sign, np.float32)
        [found] = session.run(None, {"value": value})
        np.testing.assert_allclose(found, value @ (stored.astype(np.float32) - 2 ** (num_bits - 1)).T, rtol=1e-5)
