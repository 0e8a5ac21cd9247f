"""Log probabilities as OpenAI's clients read them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.inputs.tokenizer import Tokenizer
    from hivtp.runtime.language.sampling import TokenLogprobs

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT_CHARACTER = "\ufffd"


class LogprobsWriter:
    """Writes log probabilities.

    Args:
        tokenizer: spells the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelled = lru_cache(maxsize=2**16)(self._spell)
        # Decoders treat the start of a text apart, so a token is spelled as it reads after this one.
        self._before = tokenizer.encode("a", add_special_tokens=False)

    def write(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The `logprobs` of a choice."""
        return {
            "content": [
                {
                    **self._entry(token.token_id, token.logprob),
                    "top_logprobs": [self._entry(*other) for other in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, content = self._spelled(token_id)
        # JSON has no -inf; vLLM's bound.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": content}

    def _spell(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token as text, and its bytes; None where only some bytes of a character are known to be in it."""
        name = self._tokenizer.token(token_id) or ""
        if match := _BYTE_TOKEN.fullmatch(name):
            return name, [int(match[1], 16)]
        before = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode([*self._before, token_id])[len(before) :]
        if not text or _REPLACEMENT_CHARACTER in text:
            return name, list(name.encode()) if not text else None
        return text, list(text.encode())
