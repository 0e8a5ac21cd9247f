"""What tests of the decoder share: sequences of embeddings, decoded by a scheduler, and the decoder run plainly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines.onnxruntime import open_session
from hivtp.runtime.language.onnxruntime import MIN_PREFILL_TOKENS
from hivtp.runtime.language.scheduling.scheduler import Scheduler, SchedulerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable, Sequence

    from numpy.typing import NDArray

    from hivtp import HivtpError
    from hivtp.engines.bundle import Bundle
    from hivtp.runtime.language.base import LanguageBackend


def greedy(logits: NDArray[np.float32]) -> int:
    return int(logits.argmax())


def embeddings(length: int, seed: int = 0) -> NDArray[np.float32]:
    """Random ones of the tiny language model's width."""
    return np.random.default_rng(seed).normal(size=(length, 64)).astype(np.float32)


class Decoded:
    """A DecodeRequest that notes what becomes of it."""

    def __init__(
        self,
        embeds: NDArray[np.float32],
        max_new_tokens: int = 8,
        choose: Callable[[NDArray[np.float32]], int] = greedy,
        *,
        keys: Sequence[Hashable] | None = None,
        ends: Container[int] = (),
    ) -> None:
        self.embeds = embeds
        self.max_new_tokens = max_new_tokens
        self.choose = choose
        self.keys = keys
        self.ends = ends
        self.tokens: list[int] = []
        self.step_ms: list[float] = []
        self.error: HivtpError | None = None
        self.num_cached: int | None = None

    def begin(self, num_cached: int) -> None:
        assert self.num_cached is None
        self.num_cached = num_cached

    def push(self, token_id: int, milliseconds: float) -> bool:
        assert self.num_cached is not None
        assert self.error is None
        self.tokens.append(token_id)
        self.step_ms.append(milliseconds)
        return token_id not in self.ends

    def fail(self, error: HivtpError) -> None:
        assert self.error is None
        self.error = error


def make_scheduler(language: LanguageBackend, num_slots: int = 1, capacity: int = 512, **options: object) -> Scheduler:
    return Scheduler(language, SchedulerOptions(num_slots, capacity, **options))


def decode_all(language: LanguageBackend, sequences: Sequence[Decoded], **options: object) -> None:
    """Decode sequences together."""
    scheduler = make_scheduler(language, **{"num_slots": len(sequences), **options})
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.run()


def decode(
    language: LanguageBackend,
    embeds: NDArray[np.float32],
    max_new_tokens: int,
    choose: Callable[[NDArray[np.float32]], int] = greedy,
    ends: Container[int] = (),
) -> list[int]:
    """The tokens that one sequence gets alone."""
    sequence = Decoded(embeds, max_new_tokens, choose, ends=ends)
    decode_all(language, [sequence])
    if sequence.error is not None:
        raise sequence.error
    return sequence.tokens


def logits_of_a_growing_cache(bundle: Bundle, steps: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The decoders run plainly: every step gets the past of the one before as a new, longer array."""
    manifest = bundle.manifest.language
    decoder = prefill = open_session(bundle.folder / manifest.decoder.file)
    if manifest.decoder.prefill_file is not None:
        prefill = open_session(bundle.folder / manifest.decoder.prefill_file)
    names = [output.name for output in decoder.get_outputs()]
    empty = np.zeros((1, manifest.num_kv_heads, 0, manifest.head_size), manifest.decoder.dtype)
    past = {
        f"past_key_values.{layer}.{kind}": empty for layer in range(manifest.num_layers) for kind in ("key", "value")
    }
    logits, length = [], 0
    for step in steps:
        length += len(step)
        inputs = {"inputs_embeds": step[None].astype(empty.dtype), "attention_mask": np.ones((1, length), np.int64)}
        session = prefill if len(step) >= MIN_PREFILL_TOKENS else decoder
        outputs = dict(zip(names, session.run(names, {**inputs, **past}), strict=True))
        logits.append(outputs["logits"][0, -1].astype(np.float32))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        assert past["past_key_values.0.key"].shape[2] == length
    return logits
