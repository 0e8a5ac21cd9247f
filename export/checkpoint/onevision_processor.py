"""The processor of LLaVA-OneVision without its part for videos, which needs torchvision and is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_KEYS = ("num_image_tokens", "vision_feature_select_strategy", "chat_template", "image_token", "vision_aspect_ratio")


def open_onevision_processor(folder: Path) -> Any:
    """The processor of a folder; it raises what transformers raises."""
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaOnevisionProcessor

    class Processor(LlavaOnevisionProcessor):  # type: ignore[misc]  # transformers types it Any
        """For images and text."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    settings, _ = Processor.get_processor_dict(folder, local_files_only=True)
    return Processor(
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil", trust_remote_code=False),
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        **{key: settings[key] for key in _KEYS if settings.get(key) is not None},
    )
