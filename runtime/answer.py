"""What a pipeline gives back: the answer, its counts and its timings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in milliseconds.

    `Pipeline.generate_batch` and `Pipeline.generate_each` say what they are where requests share the time.

    Attributes:
        preprocess_ms: reading and resizing the images, and tokenising the prompt.
        vision_ms: the vision graph, pruning and projector included.
        prefill_ms: the language model on the whole prompt, up to the first token.
        ttft_ms: from the request to the first token; the sum of the three.
        decode_ms_per_token: mean time of each further token; None where there was none.
    """

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float | None


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: the answer, without special tokens.
        token_ids: every generated token, the end-of-sequence token included.
        num_image_tokens: visual tokens of the request before pruning.
        num_kept_tokens: visual tokens that the language model saw.
        kept_indices: for each tile the raster indices of its kept patches.
        finish_reason: "stop" after an end-of-sequence token; "length" at `max_new_tokens` or a full context.
        timings: where the time went.
    """

    text: str
    token_ids: list[int]
    num_image_tokens: int
    num_kept_tokens: int
    kept_indices: list[list[int]]
    finish_reason: FinishReason
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values, ready for JSON."""
        return asdict(self)
