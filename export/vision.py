"""The vision graphs: CLIP tower, scores from its middle layers, the pruning op, the projector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hivtp.export.graph import OPSET, GraphBuilder, VisionPrecision
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    import onnx_ir as ir

    from hivtp.export.checkpoint import Checkpoint
    from hivtp_ops.spec import PruningSpec

GraphKind = Literal["vision", "encoder"]


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a LLaVA vision tower that the graph, the manifest and the checks share."""

    num_layers: int
    num_heads: int
    hidden_size: int
    image_size: int
    patch_size: int
    feature_layer: int
    has_cls_feature: bool
    language_hidden_size: int

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Read the sizes from a `transformers.LlavaConfig`."""
        vision = config.vision_config
        return cls(
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            hidden_size=vision.hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            feature_layer=config.vision_feature_layer,
            has_cls_feature=config.vision_feature_select_strategy == "full",
            language_hidden_size=config.text_config.hidden_size,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Features in front of the patches: the CLS where the strategy is "full", else none."""
        return int(self.has_cls_feature)

    @cached_property
    def num_feature_layers(self) -> int:
        """How many encoder layers run before the features: `hidden_states[i]` is the output of layer i."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.num_layers + 1 + layer


def build_vision_graph(
    checkpoint: Checkpoint, spec: PruningSpec | None, precision: VisionPrecision, kind: GraphKind = "vision"
) -> ir.Model:
    """Build one of the two vision graphs of DESIGN.md, section 3.

    "vision": `pixel_values` [tiles, 3, H, W] float32 → `image_embeds` [tiles, prefix + capacity, hidden of
    the language model] float32 and, with a spec, `kept_indices` [tiles, capacity] int64, `kept_counts`
    [tiles] int64 and `importance` [tiles, patches] float32. Rows beyond the count are zero.

    "encoder": `features` [tiles, prefix + patches, width], `attention` [tiles, layers, heads, 1 + patches,
    1 + patches] of the scoring layers and `importance`, all float32, nothing pruned.

    Args:
        checkpoint: an open checkpoint; only its vision and projector weights are read.
        spec: with its layers resolved; None for no pruning (only with "vision").
        precision: see GraphBuilder.
        kind: which graph.
    """
    return _VisionGraph(checkpoint, spec, precision).build(kind)


class _VisionGraph:
    def __init__(self, checkpoint: Checkpoint, spec: PruningSpec | None, precision: VisionPrecision) -> None:
        self.shape = VisionShape.of(checkpoint.config)
        self.config = checkpoint.config
        self.spec = spec
        self.graph = GraphBuilder(checkpoint.tensor, precision)
        self.scoring_layers: range = range(0)
        if spec is not None:
            assert spec.first_layer is not None, "the exporter resolves the layers first"
            assert spec.num_layers is not None, "the exporter resolves the layers first"
            self.scoring_layers = range(spec.first_layer, spec.first_layer + spec.num_layers)
        self.attention_maps: list[ir.Value] = []

    def build(self, kind: GraphKind) -> ir.Model:
        graph, shape = self.graph, self.shape
        pixels = graph.input("pixel_values", "FLOAT", ["tiles", 3, shape.image_size, shape.image_size])
        hidden = self._embeddings(pixels)
        if kind == "encoder":
            return self._encoder_model(self._run_layers(hidden, rows=None))
        if self.spec is None:
            return self._unpruned_model(self._run_layers(hidden, rows=None))
        return self._pruned_model(hidden)

    def _pruned_model(self, hidden: ir.Value) -> ir.Model:
        graph, shape, spec = self.graph, self.shape, self.spec
        assert spec is not None, "called for pruned graphs only"
        # The last layer needs its queries for the kept rows only, once the scores stand before it.
        last = shape.num_feature_layers - 1
        is_last_layer_pruned = last >= 0 and self.scoring_layers.stop <= last
        if is_last_layer_pruned:
            hidden = self._run_layers(hidden, rows=None, stop=last)
        else:
            hidden = self._run_layers(hidden, rows=None)
        importance = self._importance()
        indices, counts = self._select(importance)
        rows = self._rows(indices)
        if is_last_layer_pruned:
            features = self._layer(last, hidden, rows)
        else:
            features = graph.op("GatherND", hidden, rows, name="kept_features", batch_dims=1)
        embeds = self._zero_padding(self._project(features), counts)
        capacity = spec.capacity(shape.grid)
        num_tokens = shape.num_prefix_tokens + capacity
        outputs = [
            (embeds, "FLOAT", ["tiles", num_tokens, shape.language_hidden_size]),
            (indices, "INT64", ["tiles", capacity]),
            (counts, "INT64", ["tiles"]),
            (importance, "FLOAT", ["tiles", shape.num_patches]),
        ]
        from hivtp_ops.onnx_function import hierarchical_prune_function

        return graph.model(outputs, [hierarchical_prune_function(shape.grid, spec, opset=OPSET)])

    def _unpruned_model(self, hidden: ir.Value) -> ir.Model:
        shape = self.shape
        embeds = self.graph.cast(self._project(self._drop_cls(hidden)), "FLOAT", "image_embeds")
        num_tokens = shape.num_prefix_tokens + shape.num_patches
        return self.graph.model([(embeds, "FLOAT", ["tiles", num_tokens, shape.language_hidden_size])], [])

    def _encoder_model(self, hidden: ir.Value) -> ir.Model:
        graph, shape = self.graph, self.shape
        importance = self._importance()
        axis = graph.constant("axis_layers", [1])
        maps = [graph.op("Unsqueeze", item, axis, name=f"{item.name}.map") for item in self.attention_maps]
        attention = graph.op("Concat", *maps, name="attention", axis=1)
        features = graph.cast(self._drop_cls(hidden), "FLOAT", "features")
        side = 1 + shape.num_patches
        num_rows = shape.num_prefix_tokens + shape.num_patches
        outputs = [
            (features, "FLOAT", ["tiles", num_rows, shape.hidden_size]),
            (attention, "FLOAT", ["tiles", len(maps), shape.num_heads, side, side]),
            (importance, "FLOAT", ["tiles", shape.num_patches]),
        ]
        return graph.model(outputs, [])

    def _embeddings(self, pixels: ir.Value) -> ir.Value:
        graph, shape = self.graph, self.shape
        width = shape.hidden_size
        if graph.precision == "fp16":
            pixels = graph.cast(pixels, "FLOAT16", "pixels")
        patches = graph.op(
            "Conv", pixels, graph.weight("vision.embeddings.patch_embedding.weight"), name="patches",
            kernel_shape=[shape.patch_size] * 2, strides=[shape.patch_size] * 2,
        )  # fmt: skip
        patches = graph.op("Reshape", patches, graph.constant("flat", [0, width, -1]), name="patches.flat")
        patches = graph.op("Transpose", patches, name="patches.rows", perm=[0, 2, 1])
        cls = graph.weight("vision.embeddings.class_embedding", shape=(1, 1, width))
        tiles = graph.op("Shape", patches, name="tiles", start=0, end=1)
        cls_shape = graph.op("Concat", tiles, graph.constant("one_row", [1, width]), name="cls.shape", axis=0)
        cls = graph.op("Expand", cls, cls_shape, name="cls")
        tokens = graph.op("Concat", cls, patches, name="tokens", axis=1)
        positions = graph.weight("vision.embeddings.position_embedding.weight")
        tokens = graph.op("Add", tokens, positions, name="tokens.positioned")
        return self._norm(tokens, "vision.pre_layrnorm", "pre_norm")

    def _run_layers(self, hidden: ir.Value, rows: ir.Value | None, stop: int | None = None) -> ir.Value:
        """Run the layers that the features need, then any further scoring layers for their attention alone."""
        num_feature_layers = self.shape.num_feature_layers if stop is None else stop
        for index in range(num_feature_layers):
            hidden = self._layer(index, hidden, rows)
        beyond = hidden
        for index in range(num_feature_layers, self.scoring_layers.stop):
            beyond = self._layer(index, beyond, rows)
        return hidden

    def _layer(self, index: int, hidden: ir.Value, rows: ir.Value | None) -> ir.Value:
        """One encoder layer; with `rows`, its output for those rows only."""
        graph, name, path = self.graph, f"layers.{index}", f"vision.encoder.layers.{index}"
        normed = self._norm(hidden, f"{path}.layer_norm1", f"{name}.norm1")
        queries_from, residual = normed, hidden
        if rows is not None:
            queries_from = graph.op("GatherND", normed, rows, name=f"{name}.kept_norm1", batch_dims=1)
            residual = graph.op("GatherND", hidden, rows, name=f"{name}.kept", batch_dims=1)
        attended = self._attention(index, queries_from, normed, f"{name}.attention", f"{path}.self_attn")
        hidden = graph.op("Add", residual, attended, name=f"{name}.attended")
        normed = self._norm(hidden, f"{path}.layer_norm2", f"{name}.norm2")
        inner = self._linear(normed, f"{path}.mlp.fc1", f"{name}.fc1")
        inner = activation(graph, self.config.vision_config.hidden_act, inner, f"{name}.activation")
        outer = self._linear(inner, f"{path}.mlp.fc2", f"{name}.fc2")
        return graph.op("Add", hidden, outer, name=f"{name}.output")

    def _attention(
        self, index: int, queries_from: ir.Value, normed: ir.Value, name: str, path: str
    ) -> ir.Value:
        graph, num_heads = self.graph, self.shape.num_heads
        queries = self._linear(queries_from, f"{path}.q_proj", f"{name}.queries")
        keys = self._linear(normed, f"{path}.k_proj", f"{name}.keys")
        values = self._linear(normed, f"{path}.v_proj", f"{name}.values")
        if index in self.scoring_layers:
            mixed = self._explicit_attention(queries, keys, values, name)
        else:
            mixed = graph.op(
                "Attention", queries, keys, values, name=f"{name}.fused",
                q_num_heads=num_heads, kv_num_heads=num_heads, softmax_precision=1,
            )  # fmt: skip
        return self._linear(mixed, f"{path}.out_proj", f"{name}.output")

    def _explicit_attention(self, queries: ir.Value, keys: ir.Value, values: ir.Value, name: str) -> ir.Value:
        """Attention with its map in the open: the form whose probabilities can be read (HIVTP, importance)."""
        graph, shape = self.graph, self.shape
        head_size = shape.hidden_size // shape.num_heads
        split = graph.constant("split_heads", [0, -1, shape.num_heads, head_size])
        merge = graph.constant("merge_heads", [0, -1, shape.hidden_size])

        def heads(value: ir.Value, perm: list[int]) -> ir.Value:
            value = graph.op("Reshape", value, split, name=f"{value.name}.split")
            return graph.op("Transpose", value, name=f"{value.name}.heads", perm=perm)

        scaled = graph.op(
            "Mul", queries, graph.constant("attention_scale", head_size**-0.5), name=f"{name}.scaled"
        )
        logits = graph.op(
            "MatMul", heads(scaled, [0, 2, 1, 3]), heads(keys, [0, 2, 3, 1]), name=f"{name}.logits"
        )
        wide = graph.cast(logits, "FLOAT", f"{name}.logits.float32") if graph.precision == "fp16" else logits
        probabilities = graph.op("Softmax", wide, name=f"{name}.probabilities", axis=-1)
        self.attention_maps.append(probabilities)
        if graph.precision == "fp16":
            probabilities = graph.cast(probabilities, "FLOAT16", f"{name}.probabilities.float16")
        mixed = graph.op("MatMul", probabilities, heads(values, [0, 2, 1, 3]), name=f"{name}.mixed")
        mixed = graph.op("Transpose", mixed, name=f"{name}.rows", perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, merge, name=f"{name}.merged")

    def _importance(self) -> ir.Value:
        """Mean attention that each patch receives, over layers, heads and all queries (HIVTP; DESIGN.md 2.1)."""
        graph = self.graph
        axes = graph.constant("axes_heads_queries", [1, 2])
        means = [
            graph.op("ReduceMean", item, axes, name=f"{item.name}.received", keepdims=0)
            for item in self.attention_maps
        ]
        total = means[0]
        for index, mean in enumerate(means[1:], start=1):
            total = graph.op("Add", total, mean, name=f"importance.sum{index}")
        share = graph.constant("layer_share", np.float32(1.0 / len(means)))
        average = graph.op("Mul", total, share, name="importance.with_cls")
        starts, ends = graph.constant("after_cls", [1]), graph.constant("to_end", [2**31])
        return graph.op(
            "Slice", average, starts, ends, graph.constant("axis_patches", [1]), name="importance"
        )

    def _select(self, importance: ir.Value) -> list[ir.Value]:
        from hivtp_ops.onnx_function import hierarchical_prune_node

        assert self.spec is not None, "called for pruned graphs only"
        import onnx_ir as ir

        proto = hierarchical_prune_node(
            "importance", ("kept_indices", "kept_counts"), self.shape.grid, self.spec, name="prune"
        )
        attributes = {attribute.name: ir.from_proto(attribute).value for attribute in proto.attribute}
        return self.graph.op_multi_out(
            proto.op_type, importance, name="prune", outputs=list(proto.output), domain=proto.domain,
            attributes=attributes,
        )  # fmt: skip

    def _rows(self, indices: ir.Value) -> ir.Value:
        """Token rows [tiles, prefix + capacity, 1] to gather; padding (-1) reads row 0, and is zeroed later."""
        graph = self.graph
        # Token 0 is the CLS, so patch i is token i + 1, and padding (-1) becomes the CLS row.
        rows = graph.op("Add", indices, graph.constant("cls_offset", [1]), name="rows.tokens")
        if self.shape.has_cls_feature:
            first = graph.op("Slice", rows, graph.constant("zero", [0]), graph.constant("after_cls", [1]),
                             graph.constant("axis_patches", [1]), name="rows.first")  # fmt: skip
            cls_row = graph.op("Mul", first, graph.constant("zero", [0]), name="rows.cls")
            rows = graph.op("Concat", cls_row, rows, name="rows.with_cls", axis=1)
        return graph.op("Unsqueeze", rows, graph.constant("axis_last", [-1]), name="rows")

    def _zero_padding(self, embeds: ir.Value, counts: ir.Value) -> ir.Value:
        graph, shape = self.graph, self.shape
        assert self.spec is not None, "called for pruned graphs only"
        prefix, capacity = shape.num_prefix_tokens, self.spec.capacity(shape.grid)
        positions = graph.constant("positions", np.arange(prefix + capacity) - prefix)
        limits = graph.op("Unsqueeze", counts, graph.constant("axis_last", [-1]), name="limits")
        is_kept = graph.op("Less", positions, limits, name="is_kept.rows")
        is_kept = graph.op("Unsqueeze", is_kept, graph.constant("axis_last", [-1]), name="is_kept")
        embeds = graph.cast(embeds, "FLOAT", "embeds.float32")
        return graph.op(
            "Where", is_kept, embeds, graph.constant("padding", np.float32(0.0)), name="image_embeds"
        )

    def _drop_cls(self, hidden: ir.Value) -> ir.Value:
        if self.shape.has_cls_feature:
            return hidden
        graph = self.graph
        starts, ends = graph.constant("after_cls", [1]), graph.constant("to_end", [2**31])
        return graph.op(
            "Slice", hidden, starts, ends, graph.constant("axis_patches", [1]), name="patch_features"
        )

    def _project(self, features: ir.Value) -> ir.Value:
        inner = self._linear(features, "projector.linear_1", "projector.inner")
        inner = activation(self.graph, self.config.projector_hidden_act, inner, "projector.activation")
        return self._linear(inner, "projector.linear_2", "projector.output")

    def _linear(self, value: ir.Value, path: str, name: str) -> ir.Value:
        has_bias = self.config.multimodal_projector_bias or not path.startswith("projector.")
        return self.graph.linear(value, f"{path}.weight", f"{path}.bias" if has_bias else None, name)

    def _norm(self, value: ir.Value, path: str, name: str) -> ir.Value:
        epsilon = self.config.vision_config.layer_norm_eps
        return self.graph.in_float32(
            "LayerNormalization", value, f"{path}.weight", f"{path}.bias", name=name, epsilon=epsilon
        )


def activation(graph: GraphBuilder, kind: str, value: ir.Value, name: str) -> ir.Value:
    """One of the activations that CLIP towers and LLaVA projectors use.

    Raises:
        CheckpointError: for any other.
    """
    if kind == "quick_gelu":
        gate = graph.op("Mul", value, graph.constant("quick_gelu_scale", 1.702), name=f"{name}.scaled")
        return graph.op("Mul", value, graph.op("Sigmoid", gate, name=f"{name}.gate"), name=name)
    approximate = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}.get(kind)
    if approximate is not None:
        return graph.op("Gelu", value, name=name, approximate=approximate)
    if kind == "relu":
        return graph.op("Relu", value, name=name)
    raise CheckpointError(f"activation {kind!r} is not supported; supported are quick_gelu, gelu and relu")
