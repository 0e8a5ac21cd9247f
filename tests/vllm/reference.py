"""Prompts with images of all shapes, and what transformers answers to them when `prune` has pruned it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hivtp.runtime.integrations.transformers import prune
from hivtp_ops import PruningSpec
from tests.support.family import GRID, SIZES, greedy, picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from tests.support.family import Family

QUESTIONS = ("what is this?", "how many red houses are there in the photo?", "a dog", "where is the blue car")
# One for each family: presets, layers, newlines, and a rule of one's own.
RULES: dict[str, dict[str, Any]] = {
    "llava": {"preset": "192", "first_layer": 1, "num_layers": 3},
    "llava_next": {"preset": "64", "keep": 9, "newline": "all"},
}


@dataclass(frozen=True)
class Prompt:
    text: str
    images: tuple[Image.Image, ...]

    @property
    def for_vllm(self) -> dict[str, Any]:
        return {"prompt": self.text, "multi_modal_data": {"image": list(self.images)}}


def prompts() -> list[Prompt]:
    """Twenty, of all shapes of images."""
    found = [
        Prompt(f"USER: <image>\n{QUESTIONS[number % len(QUESTIONS)]} ASSISTANT:", (picture(number, size),))
        for number, size in enumerate([*SIZES, (90, 90), (64, 64), (61, 67), (40, 100), (110, 30), *SIZES[:4]])
    ]
    pairs = [(picture(100 + number, size), picture(200 + number, SIZES[0])) for number, size in enumerate(SIZES[:4])]
    found += [Prompt("USER: <image> <image>\nwhat are there? ASSISTANT:", pair) for pair in pairs]
    found += [
        Prompt(
            "USER: is <image> small and <image> round ? ASSISTANT:", (picture(300, SIZES[3]), picture(300, SIZES[3]))
        ),
        Prompt(
            "USER: <image><image><image>\nhow many ? ASSISTANT:", tuple(picture(310 + n, SIZES[n]) for n in (4, 0, 1))
        ),
    ]
    assert len(found) == 20
    return found


def spec_of(rule: dict[str, Any]) -> PruningSpec:
    rest = {name: value for name, value in rule.items() if name not in ("preset", "newline")}
    return replace(PruningSpec.preset(rule["preset"], GRID), **rest)


def expected(family: Family, rule: dict[str, Any] | None, asked: Sequence[Prompt]) -> tuple[list[list[int]], list[int]]:
    """The tokens of each answer, and the length of each prompt, in transformers."""
    model, tokens, lengths = family.load(), [], []
    pruned = None if rule is None else prune(model, spec_of(rule), newline=rule.get("newline", "all"))
    for prompt in asked:
        inputs = family.inputs(prompt.text, prompt.images)
        num_tokens = inputs["input_ids"].shape[1]
        if pruned is not None:
            with torch.no_grad():
                images = pruned.encode(inputs["pixel_values"], inputs.get("image_sizes"))
            num_tokens -= int((~images.is_kept).sum())
        [answer] = greedy(model, inputs)
        tokens.append(answer)
        lengths.append(num_tokens)
    return tokens, lengths
