"""A checkpoint in the original layout, made whole: image token, processor, vision tower."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivtp.export.checkpoint.original import check_files
from hivtp.export.checkpoint.original_layout.conversations import conversation_of
from hivtp.export.checkpoint.tokenizer import check_tokenizer_files
from hivtp.runtime.checkpoint.original_layout import lengthened
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from hivtp.export.checkpoint.original_layout.tower import TowerFolder
    from hivtp.runtime.checkpoint.weight_files import Location

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# Rows of the embeddings come in multiples of this, as those of the checkpoints that were converted.
ROWS_STEP = 64
_OPENAI_MEAN, _OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class OriginalOptions:
    """What a checkpoint in the original layout does not say.

    Attributes:
        conversation: the form of a conversation, see CONVERSATIONS; None takes that of its kind.
        vision_tower: folder of the vision tower; None where the checkpoint holds it.
    """

    conversation: str | None = None
    vision_tower: Path | None = None

    def refuse(self, folder: Path) -> None:
        """Refuse options for a checkpoint in the layout of transformers, which says all this itself.

        Raises:
            CheckpointError: which option.
        """
        for name, value in (("--conversation", self.conversation), ("--vision-tower", self.vision_tower)):
            if value is not None:
                raise CheckpointError(
                    f"{name} is for checkpoints in the layout of the original LLaVA code, and {folder} is in that of "
                    "transformers; leave it out"
                )


def complete(
    folder: Path,
    raw: Mapping[str, Any],
    config: Any,
    locations: Mapping[str, Location],
    tower: TowerFolder | None,
    options: OriginalOptions,
) -> tuple[dict[str, Location], Any]:
    """Add to a checkpoint what its conversion to transformers adds; the config is changed in place.

    Returns:
        All weights, and the processor as transformers would have it.

    Raises:
        CheckpointError: the vision tower is missing, or the tokenizer cannot be used.
    """
    whole = dict(locations)
    if not any(name.startswith("vision.") for name in locations):
        if tower is None or not tower.locations:
            raise CheckpointError(
                f"{folder} does not hold its vision tower {str(raw.get('mm_vision_tower'))[:200]!r}; give the folder "
                "of the CLIP model that it is, with config.json and model.safetensors: --vision-tower FOLDER"
            )
        whole |= tower.locations
    tokenizer = _tokenizer(folder)
    num_rows = max(config.text_config.vocab_size + 2, len(tokenizer))
    config.text_config.vocab_size = -(-num_rows // ROWS_STEP) * ROWS_STEP
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    template = conversation_of(
        options.conversation, config.text_config.model_type, "<|im_start|>" in tokenizer.get_vocab()
    )
    return lengthened(whole, config.text_config.vocab_size), _processor(raw, config, tokenizer, template)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer, with the tokens that a conversion adds."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    check_files(folder)
    check_tokenizer_files(folder)
    try:
        with _errors_only():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
        if PAD_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no usable tokenizer ({' '.join(str(error).split())[:300]}); it needs tokenizer.model or "
            "tokenizer.json, and tokenizer_config.json"
        ) from error
    return tokenizer


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Hold back that the kind of model in config.json is unknown to transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _processor(raw: Mapping[str, Any], config: Any, tokenizer: Any, template: str) -> Any:
    """The processor, with the image preprocessing that the config asks for."""
    import transformers

    side = config.vision_config.image_size
    settings = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": _OPENAI_MEAN,
        "image_std": _OPENAI_STD,
    }
    is_tiled = config.model_type == "llava_next"
    if is_tiled:
        image_processor = transformers.LlavaNextImageProcessorPil(
            **settings, image_grid_pinpoints=config.image_grid_pinpoints
        )
    elif raw.get("image_aspect_ratio") == "pad":
        image_processor = transformers.LlavaImageProcessorPil(**settings, do_pad=True)
    else:
        image_processor = transformers.CLIPImageProcessorPil(**settings)
    kind = transformers.LlavaNextProcessor if is_tiled else transformers.LlavaProcessor
    return kind(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
