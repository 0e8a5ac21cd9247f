"""A builder for inference graphs: named nodes, unrounded weights on disk until saving, one place for precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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
            "int8" (linear layers in 8 bits, all else in float32); see LinearLayers.
    """

    def __init__(
        self,
        read_weight: Callable[[str], torch.Tensor],
        precision: VisionPrecision,
    ) -> None:
        import onnx_ir as ir
        from onnx_ir.tape import Tape

        self._ir = ir
        self._tape = Tape()
        self._read_weight = read_weight
        self._inputs: list[ir.Value] = []
        self._weights: dict[str, ir.Value] = {}
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


def shared_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a finished model, added to it at the first call with its name."""
    import onnx_ir as ir

    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


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
