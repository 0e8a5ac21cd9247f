"""The processor files of a bundle: tokenizer, chat template, image preprocessing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.checkpoint.chat_template import choose_template
from hivtp.export.checkpoint.image_settings import image_settings
from hivtp.export.checkpoint.original import open_original
from hivtp.export.checkpoint.tokenizer import check_tokenizer
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp_ops.errors import CheckpointError, HivtpError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.export.checkpoint.folder import Checkpoint

# Asked of every checkpoint, so that a template which loses an image is refused at the start.
QUESTION = "What is in the image?"


@dataclass(frozen=True)
class Processor:
    """What a checkpoint's processor says, as transformers reads it.

    Attributes:
        tokenizer: a fast transformers tokenizer.
        image_processor: its settings, complete.
        prompt: chat template and the tokens that it uses.
        original: the transformers processor itself.
    """

    tokenizer: Any
    image_processor: dict[str, Any]
    prompt: dict[str, Any]
    original: Any

    @classmethod
    def open(cls, checkpoint: Checkpoint, chat_template: str | None = None) -> Processor:
        """Read the processor of a checkpoint; no code of the checkpoint is run.

        Args:
            checkpoint: an open checkpoint.
            chat_template: the name of the template, where there are several; None takes the default.

        Raises:
            CheckpointError: a part is missing, not supported, or does not fit the model.
            MissingExtraError: sentencepiece is needed and not installed.
        """
        folder = checkpoint.folder
        original = checkpoint.processor or open_original(folder, checkpoint.family)
        tokenizer = original.tokenizer
        image_token = getattr(original, "image_token", "<image>")
        check_tokenizer(folder, tokenizer, image_token, checkpoint.config)
        prompt = {
            "chat_template": choose_template(folder, original, chat_template),
            # As transformers passes them to a template: an undefined one renders as nothing.
            "tokens": {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            "image_token": image_token,
        }
        opened = cls(tokenizer, image_settings(checkpoint, original.image_processor), prompt, original)
        opened._check_prompt(folder)
        return opened

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, image_processor.json and prompt.json."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not by the tokenizer itself, which says nothing of a full disk that could be told from other failures.
        (folder / "tokenizer.json").write_text(self.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "image_processor.json").write_text(json.dumps(self.image_processor, indent=2) + "\n")
        (folder / "prompt.json").write_text(json.dumps(self.prompt, indent=2) + "\n")

    def pixel_values(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """What the vision tower takes of each image as a whole: [images, 3, H, W] float32.

        For LLaVA-NeXT that is the base tile.
        """
        pixels: NDArray[np.float32] = self.original.image_processor(list(images), return_tensors="np")["pixel_values"]
        return pixels if pixels.ndim == 4 else np.ascontiguousarray(pixels[:, 0])

    def question_ids(self, question: str) -> list[int]:
        """Token ids of a question about one image, up to where the answer begins; the image is one token.

        Raises:
            PromptError: the chat template loses the question or the image.
        """
        return self._ids(Message("user", [ImagePart(b""), question]))

    def text_ids(self, question: str) -> list[int]:
        """Token ids of a question about nothing, up to where the answer begins.

        Raises:
            PromptError: the chat template loses the question.
        """
        return self._ids(Message("user", [question]))

    def _ids(self, message: Message) -> list[int]:
        template = PromptTemplate(**self.prompt)
        try:
            text = template.render([message], self._runtime_tokenizer)
            image_token_id = self.tokenizer.convert_tokens_to_ids(template.image_token)
            return template.encode(self._runtime_tokenizer, text, image_token_id)
        finally:
            template.close()

    @cached_property
    def _runtime_tokenizer(self) -> Tokenizer:
        """The tokenizer as a bundle's pipeline has it."""
        import tokenizers

        return Tokenizer(tokenizers.Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()))

    def _check_prompt(self, folder: Path) -> None:
        try:
            self.question_ids(QUESTION)
        except HivtpError as error:
            raise CheckpointError(f"{folder} cannot be asked about an image: {error}") from error
