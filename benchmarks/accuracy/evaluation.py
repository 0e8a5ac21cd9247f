"""Evaluation: held-out pictures and their questions, put to the miniature on the patches that a rule keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.rivals import Encoded
from benchmarks.miniature.model import PICTURES_PER_RUN, answer_logits, run_tower
from benchmarks.miniature.pictures import KINDS, draw

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from benchmarks.miniature.pictures import Picture

# Answers are at most two tokens and the one that ends them.
MAX_ANSWER = 3
_NO_TARGET = -1


@dataclass(frozen=True)
class Evaluation:
    """Pictures that the vision tower has seen once, and their questions as tokens.

    Attributes:
        model: a `LlavaForConditionalGeneration` in float32 that answer_logits takes.
        tokenizer: its tokenizer.
        pictures: what is asked about.
        encoded: what the rules look at.
        features: [pictures, patches, width] float32, before the projector.
        opening_ids: token ids in front of the picture.
        ids: [pictures, kinds, length] int64, question and right answer, padded at the end.
        targets: [pictures, kinds, length] int64, the token that has to follow each of them; _NO_TARGET where any may.
        question_lengths: [pictures, kinds] int64, tokens of the question alone.
    """

    model: Any
    tokenizer: Any
    pictures: Sequence[Picture]
    encoded: Encoded
    features: torch.Tensor
    opening_ids: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    question_lengths: torch.Tensor

    @classmethod
    def open(cls, checkpoint: Path, seeds: Iterable[int]) -> Evaluation:
        """Draw the pictures of these seeds, and run the vision tower on each once."""
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            attn_implementation={"vision_config": "eager", "text_config": "sdpa"},
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        pictures = [draw(seed) for seed in seeds]
        pixels = processor([picture.image for picture in pictures], return_tensors="pt")["pixel_values"]
        features, received, from_class = run_tower(model, pixels)
        with torch.inference_mode():
            embeds = model.model.multi_modal_projector(features)
        config = model.config.vision_config
        side = config.image_size // config.patch_size
        encoded = Encoded(
            received=received.numpy(),
            from_class=from_class.numpy(),
            embeds=embeds.numpy(),
            foreground=np.stack([picture.foreground for picture in pictures]),
            seeds=np.array(list(seeds)),
            grid=(side, side),
        )
        tokens = _tokenise(tokenizer, model.config.image_token_id, pictures)
        return cls(model, tokenizer, pictures, encoded, features, *tokens)

    def is_right(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether greedy decoding gives exactly the right answer: [pictures, kinds].

        It does if and only if each token of the right answer, its end included, is the most probable one after
        those before it. So one pass with the right answers in place tells, and all questions of a picture share
        it: none sees another's tokens, and each has the positions that it has alone.

        Args:
            kept: [pictures, count] int64, the patches that the language model sees, in raster order, then -1.
        """
        import torch

        results = np.zeros(self.ids.shape[:2], dtype=np.bool_)
        for pictures, patches in self._passes(kept):
            targets = self.targets[pictures]
            with torch.inference_mode():
                found = answer_logits(self.model, patches, self.opening_ids, self.ids[pictures]).argmax(dim=-1)
            results[pictures] = ((found == targets) | (targets == _NO_TARGET)).all(dim=-1).numpy()
        return results

    def answers(self, kept: NDArray[np.int64]) -> list[list[str]]:
        """The greedy answers, by picture and kind; see `is_right`."""
        import torch

        found = torch.full((*self.ids.shape[:2], MAX_ANSWER), self.tokenizer.eos_token_id)
        places = self.question_lengths[..., None] + torch.arange(MAX_ANSWER)
        for pictures, patches in self._passes(kept):
            ids, at = self.ids[pictures].clone(), places[pictures]
            for step in range(MAX_ANSWER):
                with torch.inference_mode():
                    logits = answer_logits(self.model, patches, self.opening_ids, ids)
                here = at[..., step : step + 1]
                # What stands after `here` is seen by nothing before it.
                token = logits.argmax(dim=-1).gather(2, here - 1)
                found[pictures, :, step] = token[..., 0]
                ids.scatter_(2, here, token)
        return [[self._text(tokens) for tokens in picture] for picture in found.tolist()]

    def _text(self, tokens: list[int]) -> str:
        eos = self.tokenizer.eos_token_id
        kept = tokens[: tokens.index(eos)] if eos in tokens else tokens
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def _passes(self, kept: NDArray[np.int64]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Pictures that keep equally many patches, some at a time, with the features of those patches."""
        import torch

        counts = (kept >= 0).sum(axis=1)
        for count in np.unique(counts):
            for pictures in torch.from_numpy(np.flatnonzero(counts == count)).split(PICTURES_PER_RUN):
                indices = torch.from_numpy(kept[pictures.numpy(), :count])
                yield pictures, self.features[pictures[:, None], indices]


def _tokenise(
    tokenizer: Any, image_token_id: int, pictures: Sequence[Picture]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Opening, ids, targets and lengths, as in Evaluation, by the checkpoint's own chat template."""
    import torch

    texts = {question.text for picture in pictures for question in picture.questions}
    prompts: dict[str, list[int]] = {}
    for text in texts:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompts[text] = tokenizer(rendered)["input_ids"]
    any_prompt = next(iter(prompts.values()))
    opening = any_prompt[: any_prompt.index(image_token_id)]
    questions = {text: prompt[len(opening) + 1 :] for text, prompt in prompts.items()}
    end = tokenizer.eos_token_id
    length = max(len(question) for question in questions.values()) + MAX_ANSWER
    shape = (len(pictures), len(KINDS), length)
    ids = np.full(shape, end)
    targets = np.full(shape, _NO_TARGET)
    lengths = np.zeros(shape[:2], dtype=np.int64)
    for row, picture in enumerate(pictures):
        for column, question in enumerate(picture.questions):
            prompt = questions[question.text]
            answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], end]
            assert len(answer) <= MAX_ANSWER, f"the answer {question.answer!r} takes {len(answer)} tokens"
            lengths[row, column] = len(prompt)
            ids[row, column, : len(prompt) + len(answer)] = prompt + answer
            targets[row, column, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return torch.tensor(opening), torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(lengths)
