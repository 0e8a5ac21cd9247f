"""A decoder's attention over a KV cache in blocks: the cache is an input that is written in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from hivtp_ops.errors import EngineError

ATTENTION = "GroupQueryAttention"
# Inputs of GroupQueryAttention, as the frontend of OpenVINO gives them to its own op.
COS, SIN = 7, 8
# What the decoder computes as the model builder writes it for Llama; anything else would be computed wrongly.
EXPECTED = {"do_rotary": True, "rotary_interleaved": False, "local_window_size": -1, "smooth_softmax": False}
# Inputs of the decoder with paged attention, beside `inputs_embeds` and the caches; "max_context_len" is a scalar.
POSITIONS = "position_ids"
INDICES = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
LONGEST = "max_context_len"


def page_attention(openvino: Any, model: Any) -> None:
    """Give a decoder OpenVINO's paged attention in the place of grouped-query attention, in place.

    Grouped-query attention takes the past of every layer and gives it back longer, and takes one sequence alone.
    Paged attention appends to caches that stay where they are, and takes sequences of any lengths at once. It is
    rotated before: paged attention itself does not.

    The decoder then takes, of all sequences together and one after the other:
        inputs_embeds: [sequences, positions, hidden]; the logits are those of the last position of each.
        position_ids: [sequences * positions] int64, of each position in its sequence.
        past_lens: [sequences] int32, positions that the cache holds of each.
        subsequence_begins: [sequences + 1] int32, where each begins among the positions, and the end.
        block_indices: int32, the blocks of the cache that hold each sequence, the new positions included.
        block_indices_begins: [sequences + 1] int32, where those of each sequence begin, and the end.
        max_context_len: int32, the longest sequence, the new positions included.
        key_cache.N, value_cache.N: of layer N, [blocks, kv_heads, positions of a block, head_size].

    Args:
        openvino: the package.
        model: an `openvino.Model` of a decoder; its inputs past and present and its mask go.

    Raises:
        EngineError: it is another kind of attention, or another version of OpenVINO.
    """
    ops = openvino.opset13
    added = [ops.parameter([-1], np.int64, name=POSITIONS)]
    added += [ops.parameter([-1], np.int32, name=name) for name in INDICES]
    added.append(ops.parameter([], np.int32, name=LONGEST))
    layers = [node for node in model.get_ordered_ops() if node.get_type_name() == ATTENTION]
    old = [parameter for parameter in model.get_parameters() if "inputs_embeds" not in parameter.output(0).get_names()]
    try:
        tables = _rotation_tables(ops, layers, added[0])
        for number, layer in enumerate(layers):
            added += _replace(openvino, layer, number, tables, added[1:6])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise EngineError(
            f"this version of openvino, {openvino.__version__}, cannot page the attention of the decoder ({error}); "
            "install the one that hivtp asks for: pip install 'hivtp[openvino]', or take the language backend "
            "onnxruntime"
        ) from error
    for result in model.get_results():
        if result.input_value(0).get_node().get_type_name() == ATTENTION:
            model.remove_result(result)
    for parameter in added:
        parameter.output(0).set_names({parameter.get_friendly_name()})
    model.add_parameters(added)
    for parameter in old:
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _replace(openvino: Any, layer: Any, number: int, tables: tuple[Any, Any], indices: list[Any]) -> list[Any]:
    """Put paged attention in the place of a layer's; its caches, as new inputs."""
    from openvino.op import _PagedAttentionExtension

    ops = openvino.opset13
    attributes = layer.get_attributes()
    if wrong := [name for name, value in EXPECTED.items() if attributes.get(name, value) != value]:
        raise EngineError(
            f"the decoder's attention has {wrong[0]} {attributes[wrong[0]]}, which the language backend openvino does "
            "not compute; choose onnxruntime"
        )
    num_heads, num_kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    head_size = layer.input_value(0).get_partial_shape()[3].get_length()
    queries, keys, values, shape = _heads(ops, layer, num_heads, num_kv_heads, head_size)

    def flat(heads: Any, count: int) -> Any:
        return ops.reshape(heads, np.array([-1, count * head_size]), special_zero=False)

    caches = [
        ops.parameter([-1, num_kv_heads, -1, head_size], openvino.Type.dynamic, name=f"{kind}_cache.{number}")
        for kind in ("key", "value")
    ]
    scale = ops.constant(np.float32(attributes["scale"]))
    *where, longest = indices
    attention = _PagedAttentionExtension(
        [
            node.output(0)
            for node in (
                flat(_rotated(ops, queries, *tables), num_heads),
                flat(_rotated(ops, keys, *tables), num_kv_heads),
                flat(values, num_kv_heads),
                *caches,
                *where,
                scale,
                *_unused(ops, longest),
            )
        ]
    )
    info = attention.get_rt_info()
    info["num_k_heads"] = info["num_v_heads"] = num_kv_heads
    info["k_head_size"] = info["v_head_size"] = head_size
    outcome = ops.reshape(attention.output(0), ops.concat([shape, np.array([num_heads * head_size])], 0), False)
    for port in layer.output(0).get_target_inputs():
        port.replace_source_output(outcome.output(0))
    return caches


def _heads(ops: Any, layer: Any, num_heads: int, num_kv_heads: int, head_size: int) -> tuple[Any, Any, Any, Any]:
    """Queries, keys and values [positions, heads, 1, head_size] of all sequences, and the shape [2] of their batch."""
    split = layer.input_value(0).get_node()
    transposed = split.input_value(0).get_node()
    counts = [num_heads, num_kv_heads, num_kv_heads]
    if [split.get_type_name(), transposed.get_type_name()] == ["VariadicSplit", "Transpose"]:
        # One product gives all three. Its heads lie as paged attention wants them, so nothing is moved.
        packed = transposed.input_value(0).get_node()
        heads = ops.reshape(packed, np.array([-1, sum(counts), 1, head_size]), False)
        parts = ops.variadic_split(heads, 1, np.array(counts)).outputs()
        batch = ops.slice(ops.shape_of(packed), np.array([0]), np.array([2]), np.array([1]))
        return (*parts, batch)
    parts = []
    for index, count in enumerate(counts):
        # From sequences, heads, positions.
        moved = ops.transpose(layer.input_value(index), np.array([0, 2, 1, 3]))
        parts.append(ops.reshape(moved, np.array([-1, count, 1, head_size]), False))
        batch = ops.slice(ops.shape_of(moved), np.array([0]), np.array([2]), np.array([1]))
    return (*parts, batch)


def _rotation_tables(ops: Any, layers: list[Any], positions: Any) -> tuple[Any, Any]:
    """Cosines and sines of some positions, [positions, 1, 1, head_size]; those of all layers are the same."""
    if not layers:
        raise EngineError("the decoder has no grouped-query attention, which the language backend openvino looks for")

    def rows(index: int) -> Any:
        # The halves of a head turn by the same angles.
        half = layers[0].input_value(index).get_node().data
        table = ops.constant(np.concatenate([half, half], axis=1).astype(np.float32))
        return ops.unsqueeze(ops.gather(table, positions, 0), np.array([1, 2]))

    return rows(COS), rows(SIN)


def _rotated(ops: Any, heads: Any, cosines: Any, sines: Any) -> Any:
    """Rotary position embedding, in the form that the CPU plugin knows as one op."""
    first, second = ops.split(heads, 3, 2).outputs()
    turned = ops.concat([ops.multiply(second, np.float32(-1)), first], 3)
    return ops.add(ops.multiply(heads, cosines), ops.multiply(turned, sines))


def _unused(ops: Any, longest: Any) -> list[Any]:
    """The inputs of paged attention from the tenth on, of which only the longest length is used here."""

    def no(dtype: type[np.generic]) -> Any:
        return ops.constant(np.zeros(0, dtype))

    def zero() -> Any:
        return ops.constant(np.int32(0))

    ints, floats = np.int32, np.float32
    return [
        zero(),  # sliding_window
        no(floats),  # alibi_slopes
        longest,
        *(no(ints), no(ints), no(ints), no(floats)),  # scores of positions; rotation of kept blocks
        *(no(floats), zero(), zero()),  # blocks left out by a threshold
        no(floats),  # sinks
        *(zero(), no(ints), no(ints), no(ints)),  # eviction of blocks
        no(ints),  # token_type_ids
        *(no(np.uint8), no(ints)),  # a bias between positions
    ]
