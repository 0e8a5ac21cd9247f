"""The vision graphs: the tower, the pruning op between its layers and the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from hivtp.export.graph.activation import activation
from hivtp.export.graph.builder import OPSET, GraphBuilder, Output, VisionPrecision
from hivtp.export.graph.linear import LinearLayers
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.smoothing import SmoothedWeights
from hivtp.export.graph.tower import Tower
from hivtp_ops.onnx_function import hierarchical_prune_function, hierarchical_prune_node

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp_ops.spec import PruningSpec

GraphKind = Literal["vision", "encoder"]


def build_vision_graph(
    checkpoint: Checkpoint,
    spec: PruningSpec | None,
    precision: VisionPrecision,
    kind: GraphKind = "vision",
    maxima: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """Build one of the two vision graphs.

    "vision": `pixel_values` [tiles, 3, H, W] float32 and, pruned and where images are tiled, `patch_mask`
    [tiles, patches] bool (False is padding, scored -inf) → `image_embeds` [tiles, prefix + capacity, hidden of
    the language model] float32 and, with a spec, `kept_indices` [tiles, capacity] int64, `kept_counts`
    [tiles] int64 and `importance` [tiles, patches] float32. Rows beyond the count are zero.

    "encoder": `features` [tiles, prefix + patches, width], `attention` [tiles, layers, heads, tokens,
    tokens] of the scoring layers and `importance`, all float32, nothing pruned.

    Args:
        checkpoint: an open checkpoint; only its vision and projector weights are read.
        spec: with its layers resolved; None for no pruning (only with "vision").
        precision: see GraphBuilder.
        kind: which graph.
        maxima: for fp8 and int8, see `calibrated_maxima`.

    Raises:
        CheckpointError: an activation of the model is not supported.
    """
    builder = _VisionGraph(checkpoint, spec, precision, maxima)
    if kind == "encoder":
        return builder.encoder()
    return builder.unpruned() if spec is None else builder.pruned(spec)


class _VisionGraph:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: PruningSpec | None,
        precision: VisionPrecision,
        maxima: Mapping[str, np.ndarray] | None,
    ) -> None:
        self.config = checkpoint.config
        self.is_tiled = checkpoint.is_tiled
        self.shape = VisionShape.of(checkpoint.config)
        read = checkpoint.tensor
        if precision == "int8" and maxima is not None:
            read = SmoothedWeights(checkpoint.tensor, maxima).read
        self.graph = GraphBuilder(read, precision)
        self.linears = LinearLayers(self.graph, maxima if precision == "fp8" else None)
        scoring_layers = range(0) if spec is None else spec.scoring_layers
        self.tower = Tower(self.linears, self.shape, self.config.vision_config, scoring_layers)
        side = self.shape.image_size
        self.pixels = self.graph.input("pixel_values", "FLOAT", ["tiles", 3, side, side])

    def pruned(self, spec: PruningSpec) -> ir.Model:
        graph, shape, tower = self.graph, self.shape, self.tower
        # Where the scores are known before the last layer, that layer needs the queries of the kept tokens only.
        last = shape.num_feature_layers - 1
        prunes_last_layer = tower.scoring_layers.stop <= last
        hidden = self._run_layers(last if prunes_last_layer else shape.num_feature_layers)
        importance = self._scores()
        indices, counts = self._select(importance, spec)
        rows = self._rows(indices)
        if prunes_last_layer:
            features = tower.layer(last, hidden, rows)
        else:
            features = graph.op("GatherND", hidden, rows, name="kept_features", batch_dims=1)
        capacity = spec.capacity(shape.grid)
        embeds = self._zero_padding(self._project(features), counts, capacity)
        outputs = [
            Output(embeds, "FLOAT", ("tiles", shape.num_prefix_tokens + capacity, shape.language_hidden_size)),
            Output(indices, "INT64", ("tiles", capacity)),
            Output(counts, "INT64", ("tiles",)),
            Output(importance, "FLOAT", ("tiles", shape.num_patches)),
        ]
        prune = hierarchical_prune_function(shape.grid, spec, opset=OPSET)
        return graph.model(outputs, [prune, *tower.functions()])

    def unpruned(self) -> ir.Model:
        shape = self.shape
        features = self._features(self._run_layers(shape.num_feature_layers))
        embeds = self.graph.cast(self._project(features), "FLOAT", "image_embeds")
        num_tokens = shape.num_prefix_tokens + shape.num_patches
        outputs = [Output(embeds, "FLOAT", ("tiles", num_tokens, shape.language_hidden_size))]
        return self.graph.model(outputs, self.tower.functions())

    def encoder(self) -> ir.Model:
        graph, shape = self.graph, self.shape
        hidden = self._run_layers(shape.num_feature_layers)
        features = graph.cast(self._features(hidden), "FLOAT", "features")
        axis = graph.constant("axis_layers", [1])
        maps = [graph.op("Unsqueeze", item, axis, name=f"{item.name}.map") for item in self.tower.attention_maps]
        attention = graph.op("Concat", *maps, name="attention", axis=1)
        side = shape.num_tokens
        num_rows = shape.num_prefix_tokens + shape.num_patches
        outputs = [
            Output(features, "FLOAT", ("tiles", num_rows, shape.hidden_size)),
            Output(attention, "FLOAT", ("tiles", len(maps), shape.num_heads, side, side)),
            Output(self.tower.importance("importance"), "FLOAT", ("tiles", shape.num_patches)),
        ]
        return graph.model(outputs, self.tower.functions())

    def _scores(self) -> ir.Value:
        """The importance, -inf where a tile shows padding."""
        if not self.is_tiled:
            return self.tower.importance("importance")
        graph = self.graph
        mask = graph.input("patch_mask", "BOOL", ["tiles", self.shape.num_patches])
        never = graph.constant("never", np.array(-np.inf, np.float32))
        return graph.op("Where", mask, self.tower.importance("importance.unmasked"), never, name="importance")

    def _run_layers(self, num_layers: int) -> ir.Value:
        """The output of the first `num_layers`; scoring layers beyond them run for their attention only."""
        hidden = self.tower.embed(self.pixels)
        for index in range(num_layers):
            hidden = self.tower.layer(index, hidden)
        beyond = hidden
        for index in range(num_layers, self.tower.scoring_layers.stop):
            beyond = self.tower.layer(index, beyond)
        return hidden

    def _select(self, importance: ir.Value, spec: PruningSpec) -> list[ir.Value]:
        import onnx_ir as ir

        node = hierarchical_prune_node(
            importance.name or "", ("kept_indices", "kept_counts"), self.shape.grid, spec, "prune"
        )
        attributes = {attribute.name: ir.from_proto(attribute).value for attribute in node.attribute}
        return self.graph.op_multi_out(
            node.op_type, importance, name=node.name, outputs=node.output, domain=node.domain, **attributes
        )

    def _rows(self, indices: ir.Value) -> ir.Value:
        """Token rows [tiles, prefix + capacity, 1] to gather; padding reads token 0, and is zeroed later."""
        graph = self.graph
        if self.shape.num_class_tokens:
            # Token 0 is the CLS, so patch i is token i + 1, and padding (-1) becomes token 0.
            rows = graph.op("Add", indices, graph.constant("cls_offset", [1]), name="rows.patches")
        else:
            rows = graph.op("Max", indices, graph.constant("first_row", [0]), name="rows.patches")
        if self.shape.has_cls_feature:
            widths = graph.constant("pad_front", [0, 1, 0, 0])
            rows = graph.op("Pad", rows, widths, graph.constant("cls_row", np.array(0)), name="rows.with_cls")
        return graph.op("Unsqueeze", rows, graph.constant("axis_last", [-1]), name="rows")

    def _zero_padding(self, embeds: ir.Value, counts: ir.Value, capacity: int) -> ir.Value:
        graph, prefix = self.graph, self.shape.num_prefix_tokens
        last = graph.constant("axis_last", [-1])
        positions = graph.constant("positions", np.arange(prefix + capacity) - prefix)
        is_kept = graph.op("Less", positions, graph.op("Unsqueeze", counts, last, name="limits"), name="is_kept.rows")
        is_kept = graph.op("Unsqueeze", is_kept, last, name="is_kept")
        embeds = graph.cast(embeds, "FLOAT", "embeds.float32")
        zero = graph.constant("padding", np.array(0.0, np.float32))
        return graph.op("Where", is_kept, embeds, zero, name="image_embeds")

    def _features(self, hidden: ir.Value) -> ir.Value:
        has_all = self.shape.num_prefix_tokens == self.shape.num_class_tokens
        return hidden if has_all else self.tower.drop_cls(hidden, "patch_features")

    def _project(self, features: ir.Value) -> ir.Value:
        inner = self._linear(features, "projector.linear_1", "projector.inner")
        inner = activation(self.graph, self.config.projector_hidden_act, inner, "projector.activation")
        return self._linear(inner, "projector.linear_2", "projector.output")

    def _linear(self, value: ir.Value, path: str, name: str) -> ir.Value:
        bias = f"{path}.bias" if self.config.multimodal_projector_bias else None
        return self.linears.add(value, f"{path}.weight", bias, name)
