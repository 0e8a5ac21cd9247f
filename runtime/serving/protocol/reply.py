"""The answer on the wire: one JSON object, or the chunks of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.runtime.serving.protocol.sse import event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.language.sampling import TokenLogprobs
    from hivtp.runtime.serving.protocol.chat_request import ChatRequest
    from hivtp.runtime.serving.protocol.logprobs import LogprobsWriter


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        num_prompt_tokens: positions that the language model saw of the prompt, visual tokens included.
        num_cached_tokens: of these, that it had computed for an earlier request.
        num_image_tokens: visual tokens before pruning.
        num_kept_tokens: visual tokens that the language model saw.
        num_new_tokens: of the answer so far.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_image_tokens: int
    num_kept_tokens: int
    num_new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's clients read it; the details are vLLM's, and the tokens before pruning ours."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_new_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_new_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.num_cached_tokens,
                "multimodal_tokens": {"image": self.num_kept_tokens},
                "unpruned_multimodal_tokens": {"image": self.num_image_tokens},
            },
        }


class Reply:
    """Writes the answer to one request.

    Args:
        request: what was asked.
        answer_id: tells answers apart.
        model: what the server calls the model.
        created: when the request came, in seconds since 1970.
        logprobs: spells tokens.
    """

    def __init__(
        self, request: ChatRequest, answer_id: str, model: str, created: int, logprobs: LogprobsWriter
    ) -> None:
        self._request = request
        self._id = f"chatcmpl-{answer_id}"
        self._model = model
        self._created = created
        self._logprobs = logprobs

    def body(self, answer: Answer, usage: Usage, extension: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None if answer.logprobs is None else self._logprobs.write(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop,
        }
        found = {**self._headed("chat.completion"), "choices": [choice], "usage": usage.to_dict()}
        return found if extension is None else {**found, "hivtp": extension}

    def first_chunk(self, usage: Usage) -> bytes:
        """What a stream begins with, when there is a first token."""
        return self._chunk({"role": "assistant", "content": ""}, usage)

    def text_chunk(self, text: str, tokens: Sequence[TokenLogprobs], usage: Usage) -> bytes:
        """Some text, and the log probabilities of tokens where they were asked for."""
        return self._chunk({"content": text}, usage, tokens)

    def extension_chunk(self, usage: Usage, extension: Mapping[str, Any]) -> bytes:
        """What is known beyond OpenAI's fields before the answer ends."""
        return self._chunk({}, usage, extension=extension)

    def last_chunks(self, answer: Answer, usage: Usage, extension: Mapping[str, Any] | None) -> bytes:
        """Why the answer ended, and the counts where they were asked for."""
        chunk = self._chunk({}, usage, finish_reason=answer.finish_reason, stop=answer.stop, extension=extension)
        if self._request.has_usage:
            chunk += event({**self._headed("chat.completion.chunk"), "choices": [], "usage": usage.to_dict()})
        return chunk

    def _chunk(
        self,
        delta: Mapping[str, str],
        usage: Usage,
        tokens: Sequence[TokenLogprobs] = (),
        finish_reason: str | None = None,
        stop: str | None = None,
        extension: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs.write(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = stop
        chunk: dict[str, Any] = {**self._headed("chat.completion.chunk"), "choices": [choice]}
        if self._request.has_continuous_usage:
            chunk["usage"] = usage.to_dict()
        if extension is not None:
            chunk["hivtp"] = extension
        return event(chunk)

    def _headed(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
