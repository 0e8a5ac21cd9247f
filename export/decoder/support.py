"""Whether a decoder can be written for a language model: said at the start, not after an hour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.export.checkpoint.config import head_size
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from hivtp.export.checkpoint.folder import Checkpoint

# ONNX Runtime's grouped-query attention refuses other sizes: "head_size shall be a multiple of 16".
HEAD_SIZE_STEP = 16
# Their rotations depend on the position alone, and so fit into a table; "dynamic" and "longrope" also depend on the
# length of the whole sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The decoder holds a table with a row for each position: 0.5 GB for this many.
MAX_CONTEXT_LENGTH = 2**20
LEAVE_IT_OUT = (
    "export with --language-precision none, and answer with the language backend transformers, which runs the language "
    "model of the checkpoint itself"
)


def check_decoder(checkpoint: Checkpoint) -> None:
    """Refuse a language model that the decoder cannot compute.

    Raises:
        CheckpointError: what it has, what works, and the way out.
    """
    config = checkpoint.config.text_config
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if head_size(config) % HEAD_SIZE_STEP != 0:
        found = f"heads of size {head_size(config)}"
        works = f"ONNX Runtime's attention takes multiples of {HEAD_SIZE_STEP}"
    elif rope_type not in ROPE_TYPES:
        found = f"rotary position embeddings (RoPE) of type {rope_type!r}"
        works = f"a decoder can be written for {', '.join(ROPE_TYPES)}"
    elif rope_type != "default" and rope.get("partial_rotary_factor", 1) != 1:
        found = f"rotary position embeddings (RoPE) of type {rope_type!r} for a part of each head"
        works = "a decoder can be written where they turn the whole head"
    elif config.model_type == "qwen2" and "sliding_attention" in config.layer_types:
        found = "layers with a sliding window (use_sliding_window)"
        works = "a decoder can be written for a Qwen2 without one"
    elif config.max_position_embeddings > MAX_CONTEXT_LENGTH:
        found = f"a context of {config.max_position_embeddings} positions"
        works = f"a decoder can be written for up to {MAX_CONTEXT_LENGTH}; lower max_position_embeddings in config.json"
    else:
        return
    raise CheckpointError(f"the language model of {checkpoint.folder} has {found}, and {works}. Or {LEAVE_IT_OUT}")
