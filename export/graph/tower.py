"""A vision tower as a graph: embeddings, encoder layers, and the scores of the middle layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.graph.activation import activation
from hivtp.export.graph.builder import MICROSOFT, OPSET
from hivtp.runtime.vision.tower_kinds import TOWER_KINDS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from hivtp.export.graph.linear import LinearLayers
    from hivtp.export.graph.shape import VisionShape


# Inputs of a product of 8 bits that share a scale, in the layers that the scores depend on. The first layer's channels
# are the least alike: 256 in one of trained towers where others have 1.
BLOCK_SIZE, FIRST_BLOCK_SIZE = 128, 32


class Tower:
    """Adds the nodes of a vision tower to a graph.

    Only the scoring layers compute attention as MatMul, Softmax, MatMul, the form whose probabilities can be
    read; the others use the fused operator.

    Args:
        linears: adds linear layers to the graph, whose weights are named "vision.…".
        shape: sizes of the tower.
        config: its `transformers.CLIPVisionConfig` or `SiglipVisionConfig`.
        scoring_layers: 0-based encoder layers whose attention is read.
    """

    def __init__(self, linears: LinearLayers, shape: VisionShape, config: Any, scoring_layers: range) -> None:
        self.graph = linears.graph
        self._linears = linears
        self.shape = shape
        self.config = config
        self.kind = TOWER_KINDS[config.model_type]
        self.scoring_layers = scoring_layers
        self.attention_maps: list[ir.Value] = []

    def embed(self, pixels: ir.Value) -> ir.Value:
        """Tokens [tiles, class tokens + patches, width] from pixels [tiles, 3, H, W]."""
        graph, width = self.graph, self.shape.hidden_size
        tokens = self._patches(graph.narrow(pixels, "pixels"))
        if self.kind.num_class_tokens:
            cls = graph.weight("vision.embeddings.class_embedding", shape=(1, 1, width))
            tiles = graph.op("Shape", tokens, name="tiles", start=0, end=1)
            cls_shape = graph.op("Concat", tiles, graph.constant("one_row", [1, width]), name="cls.shape", axis=0)
            cls = graph.op("Expand", cls, cls_shape, name="cls")
            tokens = graph.op("Concat", cls, tokens, name="tokens", axis=1)
        positions = graph.weight("vision.embeddings.position_embedding.weight")
        tokens = graph.op("Add", tokens, positions, name="tokens.positioned")
        return self._norm(tokens, "vision.pre_layrnorm", "pre_norm") if self.kind.has_pre_norm else tokens

    def _patches(self, pixels: ir.Value) -> ir.Value:
        """Patches [tiles, patches, width], projected."""
        graph, shape = self.graph, self.shape
        (rows, cols), side = shape.grid, shape.patch_size
        if rows * side < shape.image_size:
            # As a convolution does, whose windows do not reach to the end.
            bounds = [graph.constant(name, value) for name, value in (("first", [0, 0]), ("seen", [rows * side] * 2))]
            pixels = graph.op("Slice", pixels, *bounds, graph.constant("axes_pixels", [2, 3]), name="pixels.seen")
        # The convolution's windows do not overlap, so it is a matrix product, and a faster one on a CPU.
        split = graph.constant("split_patches", [-1, 3, rows, side, cols, side])
        patches = graph.op("Reshape", pixels, split, name="patches.split")
        patches = graph.op("Transpose", patches, name="patches.by_place", perm=[0, 2, 4, 1, 3, 5])
        num_values = 3 * side * side
        flat = graph.constant("flat_patches", [-1, shape.num_patches, num_values])
        patches = graph.op("Reshape", patches, flat, name="patches.flat")
        path = "vision.embeddings.patch_embedding"
        patches = graph.matmul(patches, f"{path}.weight", "patches", shape=(shape.hidden_size, num_values))
        if not self.kind.has_patch_bias:
            return patches
        return graph.op("Add", patches, graph.weight(f"{path}.bias"), name="patches.biased")

    def layer(self, index: int, hidden: ir.Value, rows: ir.Value | None = None) -> ir.Value:
        """One encoder layer on [tiles, tokens, width]; with `rows` [tiles, num, 1] its output for those tokens only."""
        graph, name, path = self.graph, f"layers.{index}", f"vision.encoder.layers.{index}"
        normed = self._norm(hidden, f"{path}.layer_norm1", f"{name}.norm1")
        queries_from, residual = normed, hidden
        if rows is not None:
            queries_from = graph.op("GatherND", normed, rows, name=f"{name}.kept_norm1", batch_dims=1)
            residual = graph.op("GatherND", hidden, rows, name=f"{name}.kept", batch_dims=1)
        attended = self._attention(index, queries_from, normed, f"{name}.attention", f"{path}.self_attn")
        hidden = graph.op("Add", residual, attended, name=f"{name}.attended")
        normed = self._norm(hidden, f"{path}.layer_norm2", f"{name}.norm2")
        inner = self._linear(index, normed, f"{path}.mlp.fc1", f"{name}.fc1")
        inner = activation(graph, self.config.hidden_act, inner, f"{name}.activation")
        outer = self._linear(index, inner, f"{path}.mlp.fc2", f"{name}.fc2")
        return graph.op("Add", hidden, outer, name=f"{name}.output")

    def importance(self, name: str) -> ir.Value:
        """Scores [tiles, patches] float32: the mean attention that each patch receives, over layers, heads and queries.

        Source: HIVTP (arXiv 2509.23663), importance.
        """
        graph = self.graph
        means = [self._received(item) for item in self.attention_maps]
        total = means[0]
        for index, mean in enumerate(means[1:], start=1):
            total = graph.op("Add", total, mean, name=f"importance.sum{index}")
        share = graph.constant("layer_share", np.array(1.0 / len(means), np.float32))
        if not self.kind.num_class_tokens:
            return graph.op("Mul", total, share, name=name)
        return self.drop_cls(graph.op("Mul", total, share, name="importance.with_cls"), name)

    def _received(self, attention: ir.Value) -> ir.Value:
        """Mean over heads and queries of [tiles, heads, queries, keys]: [tiles, keys] float32."""
        graph, name = self.graph, f"{attention.name}.received"
        axes = graph.constant("axes_heads_queries", [1, 2])
        if graph.is_half:
            return graph.op("ReduceMean", attention, axes, name=name, keepdims=0)
        # On a CPU a product with a constant row is 20 times as fast as reducing the whole map, and more exact. A
        # GPU would round it to TF32, so the graphs that are meant for one reduce.
        num_tokens = self.shape.num_tokens
        share = graph.constant("query_share", np.full((1, num_tokens), 1 / num_tokens, np.float32))
        by_head = graph.op("MatMul", share, attention, name=f"{name}.by_head")
        return graph.op("ReduceMean", by_head, axes, name=name, keepdims=0)

    def drop_cls(self, value: ir.Value, name: str) -> ir.Value:
        """A value [tiles, 1 + patches, ...] without its first entry."""
        graph = self.graph
        starts, ends = graph.constant("after_cls", [1]), graph.constant("to_end", [2**31])
        return graph.op("Slice", value, starts, ends, graph.constant("axis_patches", [1]), name=name)

    def _attention(self, index: int, queries_from: ir.Value, normed: ir.Value, name: str, path: str) -> ir.Value:
        graph = self.graph
        size = self._block_size(index)
        queries = self._linear(index, queries_from, f"{path}.q_proj", f"{name}.queries")
        # A term that is the same for all keys of a query cancels in the softmax; the bias of the keys is one.
        keys = self._linears.add(normed, f"{path}.k_proj.weight", None, f"{name}.keys", size)
        # Probabilities sum to one, so the bias of the values passes through them, and is added afterwards instead.
        values = self._linears.add(normed, f"{path}.v_proj.weight", None, f"{name}.values", size)
        if index in self.scoring_layers:
            mixed = self._explicit_attention(queries, keys, values, name)
        else:
            mixed = self._fused_attention(queries, keys, values, f"{name}.fused")
        bias = graph.read(f"{path}.out_proj.weight") @ graph.read(f"{path}.v_proj.bias")
        bias = (bias + graph.read(f"{path}.out_proj.bias")).astype(graph.compute_dtype.numpy())
        bias_with_values = graph.constant(f"{path}.out_proj.bias_with_values", bias)
        return self._linears.add(mixed, f"{path}.out_proj.weight", bias_with_values, f"{name}.output", size)

    def _fused_attention(self, queries: ir.Value, keys: ir.Value, values: ir.Value, name: str) -> ir.Value:
        graph, num_heads = self.graph, self.shape.num_heads
        # ONNX Runtime's own operator is faster than its standard Attention. Where it is unknown, as to TensorRT, its
        # function body is the standard one.
        return graph.op("MultiHeadAttention", queries, keys, values, name=name, domain=MICROSOFT, num_heads=num_heads)

    def functions(self) -> list[onnx.FunctionProto]:
        """Bodies for the operators of the tower that are not standard ONNX.

        TensorRT refuses an Attention that asks for a softmax in float32, so this one does not ask; fused kernels
        accumulate in float32 anyway.
        """
        from onnx import helper

        names = ["query", "key", "value"]
        num_heads = self.shape.num_heads
        body = helper.make_node("Attention", names, ["output"], q_num_heads=num_heads, kv_num_heads=num_heads)
        opsets = [helper.make_opsetid("", OPSET)]
        return [
            helper.make_function(
                MICROSOFT, "MultiHeadAttention", names, ["output"], [body], opsets, attributes=["num_heads"]
            )
        ]

    def _explicit_attention(self, queries: ir.Value, keys: ir.Value, values: ir.Value, name: str) -> ir.Value:
        graph, shape = self.graph, self.shape
        head_size = shape.hidden_size // shape.num_heads
        split = graph.constant("split_heads", [0, -1, shape.num_heads, head_size])
        merge = graph.constant("merge_heads", [0, -1, shape.hidden_size])

        def heads(value: ir.Value, perm: list[int]) -> ir.Value:
            value = graph.op("Reshape", value, split, name=f"{value.name}.split")
            return graph.op("Transpose", value, name=f"{value.name}.heads", perm=perm)

        scaled = graph.op("Mul", queries, graph.constant("attention_scale", head_size**-0.5), name=f"{name}.scaled")
        logits = graph.op("MatMul", heads(scaled, [0, 2, 1, 3]), heads(keys, [0, 2, 3, 1]), name=f"{name}.logits")
        wide = graph.widen(logits, f"{name}.logits.float32")
        probabilities = graph.op("Softmax", wide, name=f"{name}.probabilities", axis=-1)
        self.attention_maps.append(probabilities)
        probabilities = graph.narrow(probabilities, f"{name}.probabilities.half")
        mixed = graph.op("MatMul", probabilities, heads(values, [0, 2, 1, 3]), name=f"{name}.mixed")
        mixed = graph.op("Transpose", mixed, name=f"{name}.rows", perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, merge, name=f"{name}.merged")

    def _linear(self, index: int, value: ir.Value, path: str, name: str) -> ir.Value:
        return self._linears.add(value, f"{path}.weight", f"{path}.bias", name, self._block_size(index))

    def _block_size(self, index: int) -> int | None:
        """For the products of a layer; None where no score depends on them."""
        if index >= self.scoring_layers.stop:
            return None
        return BLOCK_SIZE if index else FIRST_BLOCK_SIZE

    def _norm(self, value: ir.Value, path: str, name: str) -> ir.Value:
        return self.graph.layer_norm(value, f"{path}.weight", f"{path}.bias", self.config.layer_norm_eps, name)
