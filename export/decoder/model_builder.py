"""ONNX Runtime GenAI's model builder, fed with an opened model, a config of what transformers reads, and its RoPE."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.config import sliding_window
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from hivtp.export.checkpoint.folder import Checkpoint

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# The KV cache holds the whole context, in which a chat can go back, even where attention sees a window of it.
BUILDER_OPTIONS: Mapping[str, Any] = {
    "exclude_embeds": True,
    "prune_lm_head": True,
    "windowed_kv_cache": False,
}


def builder_class(model_type: str) -> Any:
    """The builder's class of a kind of language model; its `loaded_model` is set before `make_model`.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
    """
    try:
        import onnxruntime_genai.models  # noqa: F401  it puts the builder's folder on the path
        from onnxruntime_genai.models.builders import llama, mistral, qwen
    except ImportError as error:
        raise MissingExtraError("onnxruntime-genai", "export") from error
    base = {"llama": llama.LlamaModel, "mistral": mistral.MistralModel, "qwen2": qwen.QwenModel}[model_type]

    class Decoder(base):  # type: ignore[misc, valid-type]  # the builder ships no types
        """The builder's model, fed with an already opened one instead of a folder."""

        loaded_model: PreTrainedModel

        def load_weights(self, input_path: str) -> PreTrainedModel:  # noqa: ARG002  the builder's signature
            return self.loaded_model

        def has_lm_head(self, module: Any) -> bool:
            # The builder takes any layer with as many outputs as the vocabulary has tokens.
            return module is self.loaded_model.lm_head

        def make_rope_init(self, config: Any) -> None:
            """Leave the rotations to `make_rotary_embedding_caches_from_scratch`."""

        def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
            return rotations(self.loaded_model, self.context_length)

    return Decoder


def rotations(model: PreTrainedModel, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, head size / 2] float32 of RoPE, as transformers computes them.

    Args:
        model: a causal language model whose RoPE depends on the position alone, see ROPE_TYPES.
        num_positions: from the first.
    """
    import torch

    # Its frequencies are not weights, so it is made anew off the meta device.
    rotary = type(model.model.rotary_emb)(model.config)
    cosines, sines = rotary(torch.empty(0, dtype=torch.float32), torch.arange(num_positions)[None])
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half], sines[0, :, :half]


def builder_config(checkpoint: Checkpoint) -> Any:
    """What transformers reads of the config: the builder also takes notice of keys that other models have."""
    theirs = checkpoint.config.text_config
    # Copied, since the builder writes into it.
    values: dict[str, Any] = {
        field.name: deepcopy(getattr(theirs, field.name)) for field in fields(theirs) if field.init
    }
    # The rotations are made without it; it takes notice of some of these keys.
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": theirs.rope_parameters["rope_theta"]}
    config = type(theirs)(**values)
    config.architectures = [ARCHITECTURES[config.model_type]]
    if sliding_window(config) is not None:
        # Mistral's config names no layers: its window holds in all of them.
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    return config
