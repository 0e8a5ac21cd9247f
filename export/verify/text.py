"""The text that decoders are checked on: a question in the checkpoint's chat template, and an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.export.decoder.rounding.text import readable_ids
from hivtp.export.verify.language import NUM_DECODED_TOKENS, NUM_PREFILL_TOKENS
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.checkpoint.processor import Processor

QUESTION = "Why do ships still need lighthouses?"
ANSWER = """\
A lighthouse marks a place where a ship could run aground, such as a reef or the end of a long spit of sand. Each one \
has its own rhythm of flashes, so that a captain who counts the seconds between them knows which tower it is and how \
far the coast is. Satellites tell the same more exactly, but a receiver can fail, and a storm is a bad time to find \
out. The light needs nothing from the ship except somebody who looks, and that is why most harbours keep theirs."""


def check_token_ids(checkpoint: Checkpoint, processor: Processor) -> list[int] | None:
    """As many token ids as a decoder is checked on; None where the tokenizer cannot read the text.

    Args:
        checkpoint: an open checkpoint.
        processor: of the checkpoint.
    """
    tokenizer, vocab_size = processor.tokenizer, checkpoint.config.text_config.vocab_size
    answer = readable_ids(tokenizer, ANSWER, vocab_size)
    if answer is None:
        return None
    try:
        question = processor.text_ids(QUESTION)
    except HivtpError:
        # Some templates refuse a question without an image.
        question = readable_ids(tokenizer, QUESTION, vocab_size) or []
    length = NUM_PREFILL_TOKENS + NUM_DECODED_TOKENS
    # A long system prompt would leave nothing of the answer.
    token_ids = [*question[: NUM_PREFILL_TOKENS // 2], *answer][:length]
    return token_ids if len(token_ids) == length else None
