"""What a pipeline is asked: a prompt, its images, and how to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from hivtp.runtime.sampling import SamplingSettings
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.images import ImageSource

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Request:
    """One request to a pipeline.

    Args:
        prompt: the question; `<image>` marks say where the images stand, a single image needs none.
        images: paths, encoded bytes, PIL images or uint8 arrays.
        max_new_tokens: at most this many tokens; fewer where the context ends first.
        temperature: 0 is greedy; see SamplingSettings for this and the rest.
        top_p: share of the probability to draw from.
        top_k: number of tokens to draw from; 0 is all.
        seed: of the draws.

    Raises:
        SettingsError: a setting cannot work. Prompt and images are checked where they are used.
    """

    prompt: str
    images: Sequence[ImageSource] = ()
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = SamplingSettings.temperature
    top_p: float = SamplingSettings.top_p
    top_k: int = SamplingSettings.top_k
    seed: int | None = SamplingSettings.seed

    def __post_init__(self) -> None:
        number = self.max_new_tokens
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingsError(f"max_new_tokens must be a whole number, 1 or more, not {number!r}")
        _ = self.sampling

    @property
    def sampling(self) -> SamplingSettings:
        """How its tokens are chosen."""
        return SamplingSettings(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)


class GenerationSettings(TypedDict, total=False):
    """The settings of a Request as keyword arguments; Request has their meaning and defaults."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
