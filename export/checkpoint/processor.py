"""The processor files of a bundle: tokenizer, chat template, image preprocessing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.export.checkpoint.folder import Checkpoint

IMAGE_PROCESSORS = {
    "llava": ("CLIPImageProcessor", "LlavaImageProcessor"),
    "llava_next": ("LlavaNextImageProcessor",),
}


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
    def open(cls, checkpoint: Checkpoint) -> Processor:
        """Read the processor of a checkpoint.

        Raises:
            CheckpointError: a part is missing, not supported, or does not fit the model.
        """
        from transformers import AutoProcessor

        folder = checkpoint.folder
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            tokenizer, image_processor = processor.tokenizer, processor.image_processor
        except Exception as error:
            raise CheckpointError(
                f"{folder} has no usable processor ({error}); "
                "it needs tokenizer.json, tokenizer_config.json and preprocessor_config.json"
            ) from error
        image_token = getattr(processor, "image_token", "<image>")
        prompt = {
            "chat_template": processor.chat_template or getattr(tokenizer, "chat_template", None),
            # As transformers passes them to a template: an undefined one renders as nothing.
            "tokens": {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            "image_token": image_token,
        }
        opened = cls(tokenizer, _image_settings(checkpoint, image_processor), prompt, processor)
        opened._check(checkpoint)
        return opened

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, image_processor.json and prompt.json."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not by the tokenizer itself, which says nothing of a full disk that could be told from other failures.
        (folder / "tokenizer.json").write_text(self.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "image_processor.json").write_text(json.dumps(self.image_processor, indent=2) + "\n")
        (folder / "prompt.json").write_text(json.dumps(self.prompt, indent=2) + "\n")

    def pixel_values(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """What the vision tower takes of each picture as a whole: [pictures, 3, H, W] float32.

        For LLaVA-NeXT that is the base tile.
        """
        pixels: NDArray[np.float32] = self.original.image_processor(list(pictures), return_tensors="np")["pixel_values"]
        return pixels if pixels.ndim == 4 else np.ascontiguousarray(pixels[:, 0])

    def question_ids(self, question: str) -> list[int]:
        """Token ids of a question about one image, up to where the answer begins; the image is one token.

        Raises:
            CheckpointError: the chat template loses the question or the image.
        """
        image_token, bos_token = self.prompt["image_token"], self.prompt["tokens"].get("bos_token")
        text = f"USER: {image_token}\n{question} ASSISTANT:"
        if self.prompt["chat_template"] is not None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.original.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.prompt["chat_template"],
                add_generation_prompt=True,
                tokenize=False,
            )
        if text.count(image_token) != 1 or question not in text:
            raise CheckpointError(
                f"the chat template makes {text!r} of one image and {question!r}; it must write each once"
            )
        has_bos_token = bos_token is not None and text.startswith(bos_token)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not has_bos_token)["input_ids"]
        return ids

    def _check(self, checkpoint: Checkpoint) -> None:
        folder, config = checkpoint.folder, checkpoint.config
        if not getattr(self.tokenizer, "is_fast", False):
            raise CheckpointError(f"{folder} has no tokenizer.json; save its fast tokenizer with transformers first")
        image_token = self.prompt["image_token"]
        found = self.tokenizer.convert_tokens_to_ids(image_token)
        if found != config.image_token_id:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {image_token!r} the id {found}, "
                f"the config's image_token_index is {config.image_token_id}; they do not belong together"
            )
        settings, side = self.image_processor, config.vision_config.image_size
        target = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        if (target.get("height"), target.get("width")) not in {(side, side), (None, None)}:
            raise CheckpointError(
                f"{folder}: the image processor gives {target}, the vision tower takes {side} x {side}"
            )
        if checkpoint.family == "llava_next":
            self._check_pinpoints(checkpoint)

    def _check_pinpoints(self, checkpoint: Checkpoint) -> None:
        side = checkpoint.config.vision_config.image_size
        pinpoints = checkpoint.config.image_grid_pinpoints
        is_valid = isinstance(pinpoints, list) and all(
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(length, int) and length > 0 and length % side == 0 for length in pair)
            for pair in pinpoints
        )
        if not (is_valid and pinpoints):
            raise CheckpointError(
                f"{checkpoint.folder}: image_grid_pinpoints is {pinpoints!r}; expected a list of "
                f"[height, width] in multiples of {side}"
            )
        if [list(pair) for pair in pinpoints] != self.image_processor["image_grid_pinpoints"]:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json and preprocessor_config.json have different image_grid_pinpoints"
            )


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of generation_config.json, else of the config, else the tokenizer's.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True).eos_token_id
    except OSError:
        found = None
    for candidate in (found, checkpoint.config.text_config.eos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return tuple(candidate) if isinstance(candidate, list) else (int(candidate),)
    raise CheckpointError(
        f"{checkpoint.folder} names no end-of-sequence token in generation_config.json or config.json"
    )


def _image_settings(checkpoint: Checkpoint, image_processor: Any) -> dict[str, Any]:
    name = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    supported = IMAGE_PROCESSORS[checkpoint.family]
    if name not in supported:
        raise CheckpointError(
            f"{checkpoint.folder} has the image processor {name!r}; supported are {', '.join(supported)}"
        )
    settings: dict[str, Any] = json.loads(image_processor.to_json_string())
    return settings | {"image_processor_type": name}
