"""A builder for inference graphs: named nodes, unrounded weights on disk until saving, one place for precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import onnx
    import onnx_ir as ir
    import torch

VisionPrecision = Literal["fp32", "fp16", "fp8", "int8"]
# The dtype of weights and activations; float32 where a precision is not named.
HALF_DTYPES = {"fp16": "FLOAT16", "fp8": "FLOAT16"}

# 23 is the first opset with a fused Attention; onnxruntime and TensorRT both take it. IR version 10 goes with it.
OPSET = 23
IR_VERSION = 10


# The largest number of FLOAT8E4M3FN.
MAX_FP8 = 448.0
# The smallest scale that float16 holds to half a percent.
MIN_FP8_SCALE = 2.0**-17

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Output:
    """A graph output: its value, dtype and shape; a string in `shape` is a dynamic dimension."""

    value: ir.Value
    dtype: str
    shape: tuple[int | str, ...]


class GraphBuilder:
    """Collects the nodes and weights of one ONNX graph.

    Args:
        read_weight: returns a stored weight by name; called again at saving, so nothing is held meanwhile.
        precision: "fp32"; "fp16" (weights and activations in half, norms and softmax in float32); "fp8"
            (calibrated linear layers: weights and activations in fp8, one scale each; all else as in "fp16"); or
            "int8" (linear layers with int8 weights per output channel and activations quantised to uint8
            per tensor at run time, all else in float32).
        maxima: for "fp8" only: by the name of a linear layer's weight its maximum absolute input.

    Attributes:
        factors: by the name of a linear layer's weight its input.
    """

    def __init__(
        self,
        read_weight: Callable[[str], torch.Tensor],
        precision: VisionPrecision,
        maxima: Mapping[str, float] | None = None,
    ) -> None:
        import onnx_ir as ir
        from onnx_ir.tape import Tape

        self._ir = ir
        self._tape = Tape()
        self._read_weight = read_weight
        self._inputs: list[ir.Value] = []
        self._weights: dict[str, ir.Value] = {}
        assert (maxima is not None) == (precision == "fp8"), "fp8 is calibrated, and nothing else is"
        self._maxima = maxima or {}
        self.factors: dict[str, ir.Value] = {}
        self.precision = precision
        self.is_half = precision in HALF_DTYPES
        self.compute_dtype = ir.DataType[HALF_DTYPES.get(precision, "FLOAT")]

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; a string in `shape` is a dynamic dimension."""
        value: ir.Value = self._ir.val(name, dtype=self._ir.DataType[dtype], shape=list(shape))
        self._inputs.append(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output; node and output share the name."""
        output = self._ir.val(name)
        return self._tape.op(op_type, inputs, attributes, domain=domain, name=name, output=output)

    def op_multi_out(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with several named outputs."""
        values = [self._ir.val(output) for output in outputs]
        self._tape.op_multi_out(op_type, inputs, attributes, domain=domain, name=name, outputs=values)
        return values

    def constant(self, name: str, array: np.ndarray | Sequence[int] | float) -> ir.Value:
        """A small constant; Python integers become int64 and floats the compute dtype. Shared by name."""
        if name not in self._weights:
            if isinstance(array, float):
                array = np.asarray(array, self.compute_dtype.numpy())
            tensor = self._ir.tensor(np.asarray(array), name=name)
            self._weights[name] = self._tape.initializer(tensor, name=name)
        return self._weights[name]

    def weight(self, name: str, *, shape: Sequence[int] | None = None, is_transposed: bool = False) -> ir.Value:
        """A stored weight in the compute dtype; reshaped where a shape is given, and then transposed (2-D) if asked."""
        onnx_ir, key = self._ir, f"{name}.T" if is_transposed else name
        if key in self._weights:
            return self._weights[key]
        final_shape = tuple(shape or self._read_weight(name).shape)
        numpy_dtype = self.compute_dtype.numpy()

        def read() -> ir.TensorProtocol:
            array = self.read(name).reshape(final_shape).astype(numpy_dtype, copy=False)
            tensor: ir.TensorProtocol = onnx_ir.tensor(
                np.ascontiguousarray(array.T if is_transposed else array), name=key
            )
            return tensor

        stored_shape = final_shape[::-1] if is_transposed else final_shape
        tensor = onnx_ir.LazyTensor(read, self.compute_dtype, onnx_ir.Shape(stored_shape), name=key)
        self._weights[key] = self._tape.initializer(tensor, name=key)
        return self._weights[key]

    def read(self, name: str) -> np.ndarray:
        """The values of a stored weight, float32."""
        values: np.ndarray = self._read_weight(name).float().numpy()
        return values

    def cast(self, value: ir.Value, dtype: str, name: str) -> ir.Value:
        """A value cast to `dtype`, named as in ONNX."""
        target = self._ir.DataType[dtype]
        return self.op("Cast", value, name=name, to=int(target))

    def widen(self, value: ir.Value, name: str) -> ir.Value:
        """A value of the compute dtype in float32; the value itself where it is float32."""
        return self.cast(value, "FLOAT", name) if self.is_half else value

    def narrow(self, value: ir.Value, name: str) -> ir.Value:
        """A float32 value in the compute dtype; the value itself where that is float32."""
        return self.cast(value, self.compute_dtype.name, name) if self.is_half else value

    def layer_norm(self, value: ir.Value, weight: str, bias: str, epsilon: float, name: str) -> ir.Value:
        """LayerNormalization over the last axis, in float32 whatever the precision."""
        if not self.is_half:
            return self.op(
                "LayerNormalization", value, self.weight(weight), self.weight(bias), name=name, epsilon=epsilon
            )
        parameters = [self.constant(f"{key}.float32", self.read(key)) for key in (weight, bias)]
        wide = self.widen(value, f"{name}.in")
        normed = self.op("LayerNormalization", wide, *parameters, name=f"{name}.float32", epsilon=epsilon)
        return self.narrow(normed, name)

    def linear(self, value: ir.Value, weight: str, bias: str | ir.Value | None, name: str) -> ir.Value:
        """`value @ weight.T + bias` with a torch linear layer's [out, in] weight; in 8 bits where precision says so."""
        self.factors[weight] = value
        if self.precision == "int8":
            product = self._int8_matmul(value, weight, name)
        elif self.precision == "fp8" and weight in self._maxima:
            product = self._fp8_matmul(value, weight, name)
        else:
            product = self.matmul(value, weight, name)
        if bias is None:
            return product
        return self.op("Add", product, self.weight(bias) if isinstance(bias, str) else bias, name=name)

    def matmul(self, value: ir.Value, weight: str, name: str, shape: Sequence[int] | None = None) -> ir.Value:
        """`value @ weight.T` in the compute dtype; `shape` is that of the weight as a matrix."""
        return self.op("MatMul", value, self.weight(weight, shape=shape, is_transposed=True), name=f"{name}.matmul")

    def model(self, outputs: Sequence[Output], functions: Sequence[onnx.FunctionProto]) -> ir.Model:
        """The finished model."""
        for output in outputs:
            output.value.dtype = self._ir.DataType[output.dtype]
            output.value.shape = self._ir.Shape(output.shape)
        imported = [self._ir.from_proto(function) for function in functions]
        graph = self._ir.Graph(
            inputs=self._inputs,
            outputs=[output.value for output in outputs],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET, **{function.domain: 1 for function in imported}},
            name="vision",
        )
        model: ir.Model = self._ir.Model(graph, ir_version=IR_VERSION, producer_name="hivtp", functions=imported)
        return model

    def _int8_matmul(self, value: ir.Value, weight: str, name: str) -> ir.Value:
        # The node pattern that onnxruntime fuses into one DynamicQuantizeMatMul.
        matrix, scale = quantize_per_channel(self.read(weight))
        weight_int8 = self.constant(f"{weight}.int8", matrix)
        weight_scale = self.constant(f"{weight}.scale", scale)
        zero_point = self.constant(f"{weight}.zero_point", np.zeros(scale.shape, np.int8))
        quantized, value_scale, value_zero_point = self._quantized(value)
        product = self.op("MatMulInteger", quantized, weight_int8, value_zero_point, zero_point, name=f"{name}.int32")
        product = self.cast(product, "FLOAT", f"{name}.float32")
        scales = self.op("Mul", value_scale, weight_scale, name=f"{name}.scales")
        return self.op("Mul", product, scales, name=f"{name}.matmul")

    def _fp8_matmul(self, value: ir.Value, weight: str, name: str) -> ir.Value:
        # TensorRT multiplies in fp8 where both factors come from a DequantizeLinear; other engines round in the same
        # way, and multiply in a wider type.
        matrix, scale = quantize_fp8(self.read(weight))
        zero = self._zero_fp8()
        inputs = (self.constant(f"{weight}.fp8", matrix), self.constant(f"{weight}.scale", scale), zero)
        factor = self.op("DequantizeLinear", *inputs, name=f"{weight}.half")
        return self.op("MatMul", self._through_fp8(value, self._maxima[weight]), factor, name=f"{name}.matmul")

    def _through_fp8(self, value: ir.Value, maximum: float) -> ir.Value:
        """A value, rounded to fp8; values beyond the maximum are clipped to it."""
        narrow = self._rounded_already(value, "QuantizeLinear")
        if narrow is not None:
            [usage] = narrow[0].uses()
            return usage.node.outputs[0]
        scale = self.constant(f"{value.name}.scale", fp8_scale(maximum))
        zero = self._zero_fp8()
        rounded = self.op("QuantizeLinear", value, scale, zero, name=f"{value.name}.fp8")
        return self.op("DequantizeLinear", rounded, scale, zero, name=f"{value.name}.rounded")

    def _zero_fp8(self) -> ir.Value:
        return self.constant("zero_fp8", np.zeros((), self._ir.DataType.FLOAT8E4M3FN.numpy()))

    def _quantized(self, value: ir.Value) -> Sequence[ir.Value]:
        found = self._rounded_already(value, "DynamicQuantizeLinear")
        if found is not None:
            return found
        outputs = [f"{value.name}.{suffix}" for suffix in ("uint8", "scale", "zero_point")]
        return self.op_multi_out("DynamicQuantizeLinear", value, name=f"{value.name}.quantize", outputs=outputs)

    @staticmethod
    def _rounded_already(value: ir.Value, op_type: str) -> Sequence[ir.Value] | None:
        """The outputs of an operator that already has a value as input: queries, keys and values are rounded once."""
        nodes = (usage.node for usage in value.uses())
        return next((node.outputs for node in nodes if node.op_type == op_type), None)


def shared_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a finished model, added to it at the first call with its name."""
    import onnx_ir as ir

    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


def quantize_per_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a linear layer's weight symmetrically per output channel.

    Args:
        weight: [out, in] float32.

    Returns:
        The int8 matrix [in, out] and its scales [out] float32, with weight.T ≈ matrix * scales.
    """
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / 127.0
    matrix = np.rint(weight / scale[:, None]).astype(np.int8).T
    return np.ascontiguousarray(matrix), scale.astype(np.float32)


def fp8_scale(maximum: float) -> np.ndarray:
    """The scale [] float16 by which values up to a maximum fill fp8."""
    return np.array(max(maximum / MAX_FP8, MIN_FP8_SCALE), np.float16)


def quantize_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a linear layer's weight to fp8 with one scale.

    Args:
        weight: [out, in] float32.

    Returns:
        The matrix [in, out] float8_e4m3fn and its scale [] float16, with weight.T ≈ matrix * scale.
    """
    import onnx_ir as ir

    scale = fp8_scale(float(np.abs(weight).max()))
    # float16 may have rounded the scale down, and fp8 has no infinity to overflow to.
    matrix = np.clip(weight.T / scale.astype(np.float32), -MAX_FP8, MAX_FP8)
    return np.ascontiguousarray(matrix.astype(ir.DataType.FLOAT8E4M3FN.numpy())), scale


def save_model(model: ir.Model, path: Path, on_weight: Callable[[int, int], None] = lambda _done, _total: None) -> None:
    """Write `path` and, beside it, the weights as `path.data`.

    Args:
        model: its weights may be lazy; they are read and written one after the other, so memory stays small.
        path: the .onnx file.
        on_weight: called with (weights written, all weights).
    """
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        max_workers=1,
        callback=lambda _tensor, progress: on_weight(progress.index + 1, progress.total),
    )
