"""The first answer of a server, which nobody asked for: what happens only once happens before clients come.

Weights come into memory, engines lay out theirs, and the template's process and the tokenizer's second form are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.runtime.attempt import request_errors
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.language import RemoteBackend
from hivtp.runtime.language.scheduler import Scheduler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hivtp.runtime.language.base import LanguageBackend
    from hivtp.runtime.language.remote import RequestScheduler
    from hivtp.runtime.model import Model
    from hivtp_ops.errors import HivtpError

# As long as a prompt that a prefill decoder runs, where there is one.
NUM_POSITIONS = 32
NUM_TOKENS = 3
GREY_SIDE = 64


class _FirstSequence:
    """A DecodeRequest whose tokens nobody reads."""

    max_new_tokens = NUM_TOKENS
    # Its KV cache serves nobody.
    keys: None = None

    def __init__(self, embeds: NDArray[np.float32]) -> None:
        self.embeds = embeds
        self.error: HivtpError | None = None

    def begin(self, num_cached: int) -> None:
        """See DecodeRequest.begin."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """See DecodeRequest.choose."""
        return int(logits.argmax())

    def push(self, token_id: int, milliseconds: float) -> bool:  # noqa: ARG002  a number of them is all that is wanted
        """See DecodeRequest.push."""
        return True

    def fail(self, error: HivtpError) -> None:
        """See DecodeRequest.fail."""
        self.error = error


def warm_up_decoder(scheduler: RequestScheduler, language: LanguageBackend | RemoteBackend, max_positions: int) -> None:
    """Run a prompt and some decode steps; a backend in another server was asked when it was opened.

    Args:
        scheduler: without any sequence.
        language: its backend.
        max_positions: of a sequence.

    Raises:
        HivtpError: the decoder failed.
    """
    if isinstance(language, RemoteBackend) or not isinstance(scheduler, Scheduler):
        return
    num_positions = max(1, min(NUM_POSITIONS, max_positions - NUM_TOKENS))
    sequence = _FirstSequence(language.embed([0] * num_positions))
    sequence.max_new_tokens = min(NUM_TOKENS, max_positions - num_positions)
    scheduler.add(sequence)
    scheduler.run()
    if sequence.error is not None:
        raise sequence.error


def warm_up_model(model: Model) -> None:
    """Encode a grey image, of which the cache of images keeps and counts nothing, and tokenise a conversation.

    Raises:
        HivtpError: the vision stage, the template or the tokenizer failed.
    """
    from PIL import Image

    with request_errors():
        image = Image.new("RGB", (GREY_SIDE, GREY_SIDE), "grey")
        model.images.encode_anew([model.images.prepare(image)])
        # Words with special tokens in them take another form of the tokenizer than words without.
        words = " ".join(["What is it?", model.template.image_token])
        for message in (Message("user", [ImagePart(b""), "What is it?"]), Message("user", [words])):
            text = model.template.render([message], model.tokenizer)
            model.template.encode(model.tokenizer, text, model.manifest.image_token_id)
