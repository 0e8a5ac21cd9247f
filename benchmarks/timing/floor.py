"""What a stage cannot be faster than: its arithmetic and its memory traffic, by the rates that the machine reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hivtp.export.checkpoint.config import head_size
from hivtp.export.graph.shape import VisionShape


@dataclass(frozen=True)
class Work:
    """What a stage has to do, however it is written.

    Attributes:
        flops: of its matrix products in float32, two for each multiplication with its addition; all else is small
            beside the products.
        int8_ops: the same, of its matrix products in 8 bits.
        bytes: its matrices, read once, and the KV cache; activations need not leave the caches of the processor.
    """

    flops: float
    int8_ops: float
    bytes: float


@dataclass(frozen=True)
class Peaks:
    """The rates that a machine reached; see benchmarks.timing.peaks."""

    flops_per_s: float
    int8_ops_per_s: float
    bytes_per_s: float

    def floor_ms(self, *stages: Work) -> float:
        """The least time of stages that run one after the other."""
        return 1e3 * sum(
            max(work.flops / self.flops_per_s + work.int8_ops / self.int8_ops_per_s, work.bytes / self.bytes_per_s)
            for work in stages
        )


@dataclass(frozen=True)
class Format:
    """How a graph holds its numbers, and in what it multiplies.

    Attributes:
        weight_bytes: of a weight of a linear layer, its share of the scales included.
        value_bytes: of a weight of the patch embedding, and of a number in the KV cache.
        is_int8: whether linear layers multiply in 8 bits; all other products are in float32.
    """

    weight_bytes: float
    value_bytes: int
    is_int8: bool = False

    def work(self, linear: float, others: float, weights: float, values: float) -> Work:
        """The work of a stage.

        Args:
            linear: operations in linear layers.
            others: operations in all other products.
            weights: of linear layers that are read.
            values: other numbers that are read.
        """
        num_bytes = weights * self.weight_bytes + values * self.value_bytes
        return Work(others, linear, num_bytes) if self.is_int8 else Work(linear + others, 0, num_bytes)


@dataclass(frozen=True)
class Layer:
    """The matrices of one transformer layer.

    Attributes:
        width: of its embeddings.
        query_width: of its queries, all heads together.
        kv_width: of its keys, and of its values, all heads together.
        inner_width: of its MLP.
        num_mlp_matrices: 2, or 3 where one of them is a gate.
    """

    width: int
    query_width: int
    kv_width: int
    inner_width: int
    num_mlp_matrices: int

    @property
    def num_output_weights(self) -> int:
        """Weights for a position whose output is wanted: queries, output projection and MLP."""
        return self.width * (2 * self.query_width + self.num_mlp_matrices * self.inner_width)

    @property
    def num_kv_weights(self) -> int:
        """Weights for a position that others attend to."""
        return 2 * self.width * self.kv_width

    @property
    def num_weights(self) -> int:
        """All of them."""
        return self.num_output_weights + self.num_kv_weights

    def linear(self, num_outputs: int, num_positions: int) -> float:
        """Operations of its linear layers.

        Args:
            num_outputs: positions whose output is wanted.
            num_positions: positions whose keys and values are computed.
        """
        return 2 * (num_outputs * self.num_output_weights + num_positions * self.num_kv_weights)

    def attention(self, num_pairs: float) -> float:
        """Operations of its attention, by the pairs of a query and a key that it attends to."""
        return 4 * num_pairs * self.query_width


def encoder_layer(config: Any) -> Layer:
    """A layer of the vision tower of a `transformers.LlavaConfig` or `LlavaNextConfig`."""
    vision = config.vision_config
    return Layer(vision.hidden_size, vision.hidden_size, vision.hidden_size, vision.intermediate_size, 2)


def decoder_layer(config: Any) -> Layer:
    """A layer of its language model, a Llama or Mistral."""
    text = config.text_config
    query_width, kv_width = (num * head_size(text) for num in (text.num_attention_heads, text.num_key_value_heads))
    return Layer(text.hidden_size, query_width, kv_width, text.intermediate_size, 3)


def vision_stage(config: Any, num_kept: int | None, precision: Format, num_tiles: int = 1) -> Work:
    """Tower up to the feature layer, and projector, as the graph of a bundle runs them.

    Pruned, the last layer computes queries, output and MLP of the kept tokens alone, and the projector sees no others.
    That takes the scoring layers to stand before the last one, as those of every preset do.

    Args:
        config: of the checkpoint.
        num_kept: patches that each tile keeps; None for a graph without pruning.
        precision: of the graph.
        num_tiles: tiles of one run.
    """
    shape, layer = VisionShape.of(config), encoder_layer(config)
    width, hidden, num_layers = shape.hidden_size, shape.language_hidden_size, shape.num_feature_layers
    num_tokens = 1 + shape.num_patches
    num_projected = shape.num_prefix_tokens + (shape.num_patches if num_kept is None else num_kept)
    num_last = num_tokens if num_kept is None else num_projected
    patch_weights, projector_weights = 3 * shape.patch_size**2 * width, hidden * (width + hidden)
    linear, others = 2.0 * num_projected * projector_weights, 2.0 * shape.num_patches * patch_weights
    for num_outputs in [num_tokens] * (num_layers - 1) + [num_last]:
        linear += layer.linear(num_outputs, num_tokens)
        others += layer.attention(num_outputs * num_tokens)
    weights = num_layers * layer.num_weights + projector_weights
    return precision.work(num_tiles * linear, num_tiles * others, weights, patch_weights)


def prefill(config: Any, num_tokens: int, precision: Format) -> Work:
    """From the embeddings of a prompt to the logits of its last position, and its KV cache.

    A query attends to what stands before it and to itself. The last layer computes keys and values of all positions,
    and all else of the last one alone.

    Args:
        config: of the checkpoint.
        num_tokens: of the prompt, those of its image included.
        precision: of the decoder that runs it.
    """
    layer, num_whole = decoder_layer(config), config.text_config.num_hidden_layers - 1
    linear = num_whole * layer.linear(num_tokens, num_tokens) + layer.linear(1, num_tokens)
    pairs = num_whole * num_tokens * (num_tokens + 1) / 2 + num_tokens
    return _decoder_work(config, linear, layer.attention(pairs), num_tokens, precision)


def decode_step(config: Any, num_cached: float, precision: Format) -> Work:
    """One new token.

    Args:
        config: of the checkpoint.
        num_cached: positions before it; a mean where several steps are meant.
        precision: of the decoder.
    """
    layer, num_layers = decoder_layer(config), config.text_config.num_hidden_layers
    attention = layer.attention(num_layers * (num_cached + 1))
    return _decoder_work(config, num_layers * layer.linear(1, 1), attention, num_cached, precision)


def _decoder_work(config: Any, linear: float, attention: float, num_cached: float, precision: Format) -> Work:
    """With the head's product for one position. All weights are read but the token table, of which few rows are."""
    layer, text = decoder_layer(config), config.text_config
    head = text.hidden_size * text.vocab_size
    weights = text.num_hidden_layers * layer.num_weights + head
    cache = num_cached * text.num_hidden_layers * 2 * layer.kv_width
    return precision.work(linear + 2 * head, attention, weights, cache)
