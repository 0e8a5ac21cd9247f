"""What a pipeline gives back: the answer, its counts and its timings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hivtp.runtime.language.sampling import TokenLogprobs

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
class Ran:
    """What computed an answer, for people: precisions of the weights, engines, and what they computed in.

    Attributes:
        vision: of the images; those that the cache held were computed by the same.
        language: of the tokens.
    """

    vision: str
    language: str


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: the answer, without special tokens, cut before a stop string.
        token_ids: every generated token, the end-of-sequence token and those of a stop string included.
        num_prompt_tokens: positions that the language model saw of the prompt, visual tokens included.
        num_image_tokens: visual tokens of the request before pruning.
        num_kept_tokens: visual tokens that the language model saw.
        kept_indices: for each tile the raster indices of its kept patches.
        finish_reason: "stop" after an end-of-sequence token or a stop string; "length" at `max_new_tokens` or a full
            context.
        stop: the stop string that ended the answer; None where none did.
        logprobs: for each token its log probability and the most likely tokens; None where they were not asked for.
        timings: where the time went.
        ran: what computed it.
    """

    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_image_tokens: int
    num_kept_tokens: int
    kept_indices: list[list[int]]
    finish_reason: FinishReason
    stop: str | None
    logprobs: list[TokenLogprobs] | None
    timings: Timings
    ran: Ran

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values, ready for JSON."""
        return asdict(self)
