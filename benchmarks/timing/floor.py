"""What a stage cannot be faster than: its arithmetic and its memory traffic, by the rates that the machine reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hivtp.export.graph.clip import VisionShape


@dataclass(frozen=True)
class Work:
    """What a stage has to do, however it is written.

    Attributes:
        flops: of its matrix products, two for each multiplication with its addition; all else is small beside them.
        bytes: its matrices, read once, and the KV cache; activations need not leave the caches of the processor.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Peaks:
    """The rates that a machine reached; see benchmarks.timing.peaks."""

    flops_per_s: float
    bytes_per_s: float

    def floor_ms(self, *stages: Work) -> float:
        """The least time of stages that run one after the other."""
        return sum(max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s) for work in stages) * 1e3


@dataclass(frozen=True)
class Layer:
    """The matrices of one transformer layer.

    Attributes:
        width: of its rows.
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
    def num_row_weights(self) -> int:
        """Weights that a row meets whose output is wanted: queries, output projection and MLP."""
        return self.width * (2 * self.query_width + self.num_mlp_matrices * self.inner_width)

    @property
    def num_kv_weights(self) -> int:
        """Weights that a row meets which others attend to."""
        return 2 * self.width * self.kv_width

    @property
    def num_weights(self) -> int:
        """All of them."""
        return self.num_row_weights + self.num_kv_weights

    def flops(self, num_rows: int, num_kv_rows: int, num_pairs: float) -> float:
        """Of one run.

        Args:
            num_rows: rows whose output is wanted.
            num_kv_rows: rows whose keys and values are computed.
            num_pairs: of a query and a key that it attends to.
        """
        linear = num_rows * self.num_row_weights + num_kv_rows * self.num_kv_weights
        return 2 * linear + 4 * num_pairs * self.query_width


def encoder_layer(config: Any) -> Layer:
    """A layer of the vision tower of a `transformers.LlavaConfig` or `LlavaNextConfig`."""
    vision = config.vision_config
    return Layer(vision.hidden_size, vision.hidden_size, vision.hidden_size, vision.intermediate_size, 2)


def decoder_layer(config: Any) -> Layer:
    """A layer of its language model, a Llama or Mistral."""
    text = config.text_config
    query_width, kv_width = (num * text.head_dim for num in (text.num_attention_heads, text.num_key_value_heads))
    return Layer(text.hidden_size, query_width, kv_width, text.intermediate_size, 3)


def vision_stage(config: Any, num_kept: int | None, element_bytes: int, num_tiles: int = 1) -> Work:
    """Tower up to the feature layer, and projector, as the graph of a bundle runs them.

    Pruned, the last layer computes queries, output and MLP of the kept rows alone, and the projector sees no others.
    That takes the scoring layers to stand before the last one, as those of every preset do.

    Args:
        config: of the checkpoint.
        num_kept: patches that each tile keeps; None for a graph without pruning.
        element_bytes: of a weight.
        num_tiles: tiles of one run.
    """
    shape, layer = VisionShape.of(config), encoder_layer(config)
    width, hidden = shape.hidden_size, shape.language_hidden_size
    num_tokens = 1 + shape.num_patches
    num_projected = shape.num_prefix_tokens + (shape.num_patches if num_kept is None else num_kept)
    num_last_rows = num_tokens if num_kept is None else num_projected
    patch_weights = 3 * shape.patch_size**2 * width
    projector_weights = hidden * (width + hidden)
    flops: float = 2 * (shape.num_patches * patch_weights + num_projected * projector_weights)
    for index in range(shape.num_feature_layers):
        num_rows = num_last_rows if index == shape.num_feature_layers - 1 else num_tokens
        flops += layer.flops(num_rows, num_tokens, num_rows * num_tokens)
    num_weights = patch_weights + shape.num_feature_layers * layer.num_weights + projector_weights
    return Work(num_tiles * flops, num_weights * element_bytes)


def prefill(config: Any, num_tokens: int, element_bytes: int, batch_size: int = 1) -> Work:
    """From the embeddings of prompts to the logits of their last positions, and their KV cache.

    A query attends to what stands before it and to itself. The last layer computes keys and values of all positions,
    and all else of the last one alone.

    Args:
        config: of the checkpoint.
        num_tokens: of each prompt, those of its picture included.
        element_bytes: of a weight, and of what the KV cache holds.
        batch_size: prompts.
    """
    layer, text = decoder_layer(config), config.text_config
    num_whole = text.num_hidden_layers - 1
    flops = num_whole * layer.flops(num_tokens, num_tokens, num_tokens * (num_tokens + 1) / 2)
    flops += layer.flops(1, num_tokens, num_tokens) + 2 * _head_weights(text)
    return Work(batch_size * flops, _language_bytes(config, batch_size * num_tokens, element_bytes))


def decode_step(config: Any, num_cached: float, element_bytes: int, batch_size: int = 1) -> Work:
    """One new token of each sequence.

    Args:
        config: of the checkpoint.
        num_cached: positions of each sequence before it; a mean where they differ.
        element_bytes: of a weight, and of what the KV cache holds.
        batch_size: sequences.
    """
    layer, text = decoder_layer(config), config.text_config
    flops = text.num_hidden_layers * layer.flops(1, 1, num_cached + 1) + 2 * _head_weights(text)
    return Work(batch_size * flops, _language_bytes(config, batch_size * num_cached, element_bytes))


def _language_bytes(config: Any, num_cached: float, element_bytes: int) -> float:
    """All weights but the token table, of which a run reads few rows; and the KV cache of so many positions."""
    layer, text = decoder_layer(config), config.text_config
    num_layers: int = text.num_hidden_layers
    by_layer = layer.num_weights + num_cached * 2 * layer.kv_width
    return (num_layers * by_layer + _head_weights(text)) * element_bytes


def _head_weights(text: Any) -> int:
    weights: int = text.hidden_size * text.vocab_size
    return weights
