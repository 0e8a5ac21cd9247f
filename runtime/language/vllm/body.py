"""A request as the chat endpoint of vLLM takes it, with images as embeddings."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hivtp.runtime.language.remote import RemoteRequest, Turn

# vLLM takes a signed 64-bit number.
SEED_MASK = 2**63 - 1


def chat_body(
    request: RemoteRequest, model_name: str, eos_token_ids: Sequence[int], dtype: str, *, adds_special_tokens: bool
) -> bytes:
    """The body of a POST to `/v1/chat/completions`, whose answer is streamed as token ids.

    Args:
        request: what is asked.
        model_name: what the server calls the model.
        eos_token_ids: end the answer, unless the request ignores them.
        dtype: of the embeddings.
        adds_special_tokens: the tokenizer puts them before what the chat template writes.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model_name,
        "messages": [_message(turn, dtype) for turn in request.turns],
        "add_special_tokens": adds_special_tokens,
        "stream": True,
        "return_token_ids": True,
        "max_completion_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
        # The bundle says what ends an answer, not the server's copy of the generation config.
        "ignore_eos": True,
        "stop_token_ids": [] if sampling.ignores_eos else list(eos_token_ids),
        "skip_special_tokens": False,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed & SEED_MASK
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if request.salt is not None:
        body["cache_salt"] = request.salt
    return json.dumps(body).encode()


def image_part(embeds: NDArray[np.float32], dtype: str) -> dict[str, str]:
    """An image [num_tokens, hidden] as a part of a message, in the form of a numpy file."""
    file = io.BytesIO()
    np.save(file, embeds.astype(dtype), allow_pickle=False)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getbuffer()).decode()}


def _message(turn: Turn, dtype: str) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else image_part(part, dtype) for part in turn.parts
    ]
    if all(isinstance(part, str) for part in turn.parts):
        return {"role": turn.role, "content": "".join(map(str, turn.parts))}
    return {"role": turn.role, "content": parts}
