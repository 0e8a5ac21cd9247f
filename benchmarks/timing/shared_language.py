"""Pipelines of several bundles that share one language model, where a large one fits into memory once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp import Pipeline
from hivtp.engines.bundle import Bundle
from hivtp.runtime.vision.cache import EmbeddingCache
from hivtp.runtime.vision.encoder import open_image_encoder
from hivtp.runtime.vision.stage import DEFAULT_MAX_TILES_PER_RUN, VisionStage

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines import EngineSettings


def with_language_of(first: Pipeline, folder: Path, settings: EngineSettings, engine: str = "auto") -> Pipeline:
    """A pipeline of another bundle of the same checkpoint, with the language model of the first.

    Args:
        first: holds the language model, and the tokenizer and template, which are those of the checkpoint.
        folder: the bundle; no picture is remembered.
        settings: how its vision graph runs.
        engine: where; see open_vision_engine.
    """
    bundle = Bundle.open(folder)
    vision = VisionStage.open(bundle, settings, DEFAULT_MAX_TILES_PER_RUN, engine)
    images = open_image_encoder(bundle, vision.leaving_rows_on(first.language.rows_device), EmbeddingCache(0))
    return Pipeline(bundle, images, first.template, first.tokenizer, first.language)
