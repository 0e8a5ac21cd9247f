"""What a graph takes and gives, compared with what the manifest of its bundle says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hivtp.engines.manifest import LanguageManifest, Manifest

# The type of a tensor, as onnxruntime writes it, and its shape; None stands for any length.
TensorType: TypeAlias = "tuple[str, tuple[int | None, ...]]"
Tensors: TypeAlias = "Mapping[str, TensorType]"


def vision_tensors(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of a bundle's vision graph."""
    vision = manifest.vision
    inputs: dict[str, TensorType] = {"pixel_values": ("tensor(float)", (None, 3, vision.image_size, vision.image_size))}
    outputs: dict[str, TensorType] = {
        "image_embeds": ("tensor(float)", (None, vision.num_prefix_tokens + vision.capacity, vision.hidden_size))
    }
    if manifest.pruning is not None:
        if manifest.tiling is not None:
            inputs["patch_mask"] = ("tensor(bool)", (None, vision.num_patches))
        outputs |= {
            "kept_indices": ("tensor(int64)", (None, vision.capacity)),
            "kept_counts": ("tensor(int64)", (None,)),
            "importance": ("tensor(float)", (None, vision.num_patches)),
        }
    return inputs, outputs


def decoder_tensors(manifest: LanguageManifest, dtype: str) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of a decoder.

    Args:
        manifest: sizes of the language model.
        dtype: of embeddings, logits and KV cache, float32 or float16.
    """
    floats = {"float32": "tensor(float)", "float16": "tensor(float16)"}[dtype]
    names = [f"{layer}.{kind}" for layer in range(manifest.num_layers) for kind in ("key", "value")]
    cache = (floats, (None, manifest.num_kv_heads, None, manifest.head_size))
    inputs = {
        "inputs_embeds": (floats, (None, None, manifest.hidden_size)),
        "attention_mask": ("tensor(int64)", (None, None)),
    }
    outputs = {"logits": (floats, (None, None, manifest.vocab_size))}
    return (
        inputs | {f"past_key_values.{name}": cache for name in names},
        outputs | {f"present.{name}": cache for name in names},
    )


def check_session(session: Any, file: Path, inputs: Tensors, outputs: Tensors) -> None:
    """The same as `check_tensors`, of an `onnxruntime.InferenceSession`."""
    check_tensors(file, session.get_inputs(), inputs, session.get_outputs(), outputs)


class Tensor(NamedTuple):
    """An input or output of a graph, as `onnxruntime.NodeArg` describes one; lengths that are open are no numbers."""

    name: str
    type: str
    shape: Sequence[Any]


def check_tensors(
    file: Path, found_inputs: Iterable[Any], inputs: Tensors, found_outputs: Iterable[Any], outputs: Tensors
) -> None:
    """Refuse a graph that its manifest does not describe: memory is laid out by the manifest.

    Args:
        file: the graph, for the message.
        found_inputs: what it takes, each with name, type and shape, as Tensor has them.
        inputs: those that the manifest says. A length that the graph leaves open is not compared.
        found_outputs: what it gives, the same.
        outputs: those that the manifest says.

    Raises:
        BundleError: the first difference.
    """
    for kind, found, expected in (
        ("inputs", found_inputs, inputs),
        ("outputs", found_outputs, outputs),
    ):
        problem = _difference(found, expected)
        if problem is not None:
            raise BundleError(f"the {kind} of {file} are not those that the manifest says: {problem}; export it again")


def _difference(found: Iterable[Any], expected: Tensors) -> str | None:
    by_name = {tensor.name: tensor for tensor in found}
    if missing := sorted(expected.keys() - by_name.keys()):
        return f"{missing[0]!r} is missing"
    if unknown := sorted(by_name.keys() - expected.keys()):
        return f"{unknown[0][:80]!r} is unknown"
    for name, (dtype, shape) in expected.items():
        tensor = by_name[name]
        fits = len(tensor.shape) == len(shape) and all(
            length in (None, wanted) or wanted is None or not isinstance(length, int)
            for length, wanted in zip(tensor.shape, shape, strict=True)
        )
        if tensor.type != dtype or not fits:
            return f"{name} is {tensor.type} {tensor.shape}, expected {dtype} {list(shape)}"
    return None
