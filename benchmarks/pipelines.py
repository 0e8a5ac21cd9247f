"""Pipelines as the scripts load them: on the CPU, in ONNX Runtime, with this many threads in both stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp import LanguageOptions, Pipeline, VisionOptions
from hivtp.engines import open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.runtime.model import Model
from hivtp.runtime.vision import create_image_encoder
from hivtp.runtime.vision.options import CACHE_BYTES

if TYPE_CHECKING:
    from pathlib import Path


def load_pipeline(bundle: Path, num_threads: int | None = None, cache_bytes: int = CACHE_BYTES) -> Pipeline:
    """The pipeline of a bundle; `cache_bytes` is for the images seen before."""
    vision = VisionOptions("onnxruntime", num_threads, cache_bytes=cache_bytes)
    return Pipeline.load(bundle, vision=vision, language=LanguageOptions(num_threads=num_threads))


def with_language_of(first: Pipeline, folder: Path, num_threads: int | None = None) -> Pipeline:
    """A pipeline of another bundle of the same checkpoint that shares the language model of the first.

    Args:
        first: holds the language model, and the tokenizer and template, which are those of the checkpoint.
        folder: the bundle; its images are not cached.
        num_threads: of its vision stage.
    """
    bundle, model = Bundle.open(folder), first.model
    options = VisionOptions("onnxruntime", num_threads, cache_bytes=0)
    engine = open_vision_engine(bundle, options.engine, options.engine_settings)
    images = create_image_encoder(bundle, engine, options)
    return Pipeline(Model(bundle, images, model.template, model.tokenizer, model.language))
