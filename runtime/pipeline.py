"""The pipeline: images and a prompt in, an answer out, at once or piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.runtime.answer import Answer, FinishReason, Timings
from hivtp.runtime.embedding_cache import DEFAULT_CACHE_BYTES, EmbeddingCache
from hivtp.runtime.image_encoder import open_image_encoder
from hivtp.runtime.images import load_image
from hivtp.runtime.language import LanguageBackend, create_language
from hivtp.runtime.prompt import PromptTemplate
from hivtp.runtime.sampling import Sampler, SamplingSettings
from hivtp.runtime.tokenizer import Tokenizer
from hivtp.runtime.vision import DEFAULT_MAX_TILES_PER_RUN, VisionStage
from hivtp_ops.errors import BundleError, PromptError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.runtime.image_encoder import EncodedImage, ImageEncoder, PreparedImage
    from hivtp.runtime.images import ImageSource

DEFAULT_MAX_NEW_TOKENS = 256


class Pipeline:
    """Answers prompts about images with the stages that it is given. Several threads may use it at once.

    Args:
        bundle: what the stages were made from.
        images: pictures to the embeddings of their kept tokens.
        template: a prompt to the text that the model was trained on.
        tokenizer: text to token ids and back.
        language: embeddings to tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        images: ImageEncoder,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        language: LanguageBackend,
    ) -> None:
        assert bundle.manifest.language is not None, "an encoder bundle has no pipeline"
        self.bundle = bundle
        self.images = images
        self.template = template
        self.tokenizer = tokenizer
        self.language = language
        self._image_token_id = bundle.manifest.language.image_token_id

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        num_threads: int | None = None,
        check_hashes: bool = False,
        max_tiles_per_run: int = DEFAULT_MAX_TILES_PER_RUN,
        image_cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> Pipeline:
        """Load a bundle that hivtp-export wrote; needs numpy and onnxruntime, not torch.

        Args:
            folder: the bundle.
            num_threads: threads of each engine; None leaves the choice to the engine.
            check_hashes: also compare every file's sha256 with the manifest.
            max_tiles_per_run: more tiles than this go through the vision graph in several runs.
            image_cache_bytes: memory for the embeddings of pictures seen before; 0 keeps none.

        Raises:
            BundleError: the bundle is incomplete, altered, of another schema, or cannot answer.
            MissingExtraError: onnxruntime is not installed.
            EngineError: a graph cannot be loaded.
        """
        bundle = Bundle.open(folder, check_hashes=check_hashes)
        manifest = bundle.manifest
        if manifest.language is None:
            raise BundleError(
                f"{folder} holds the {manifest.vision.graph} graph alone and cannot answer; "
                "export it with --graph vision"
            )
        settings = EngineSettings(num_threads)
        return cls(
            bundle,
            open_image_encoder(
                bundle, VisionStage.open(bundle, settings, max_tiles_per_run), EmbeddingCache(image_cache_bytes)
            ),
            _read_template(bundle),
            Tokenizer.load(bundle.processor_folder),
            create_language("onnxruntime", bundle.folder, manifest.language, settings),
        )

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = SamplingSettings.temperature,
        top_p: float = SamplingSettings.top_p,
        top_k: int = SamplingSettings.top_k,
        seed: int | None = SamplingSettings.seed,
    ) -> Answer:
        """Answer a prompt; see `stream` for the arguments and errors."""
        stream = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        for _piece in stream:
            pass
        return stream.answer

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = SamplingSettings.temperature,
        top_p: float = SamplingSettings.top_p,
        top_k: int = SamplingSettings.top_k,
        seed: int | None = SamplingSettings.seed,
    ) -> AnswerStream:
        """Answer a prompt piece by piece.

        Args:
            prompt: the question; `<image>` marks say where the images stand, a single image needs none.
            images: paths, encoded bytes, PIL images or uint8 arrays.
            max_new_tokens: at most this many tokens; fewer where the context ends first.
            temperature: 0 is greedy; see SamplingSettings for this and the rest.
            top_p: share of the probability to draw from.
            top_k: number of tokens to draw from; 0 is all.
            seed: of the draws.

        Returns:
            An iterator of text pieces; when it is exhausted, its `answer` is complete. Input is checked here,
            the model runs as the pieces are asked for.

        Raises:
            ImageError: an image cannot be read or is refused.
            PromptError: the prompt is empty, does not fit the images, or is longer than the context.
            SettingsError: a setting cannot work.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens must be a whole number, 1 or more, not {max_new_tokens!r}")
        sampler = Sampler(SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed))
        return AnswerStream(self, self._prepare(prompt, images), max_new_tokens, sampler)

    def _prepare(self, prompt: str, images: Sequence[ImageSource]) -> _Request:
        started = time.perf_counter()
        if isinstance(images, str | bytes) or not isinstance(images, Sequence):
            raise PromptError(f"images must be a list of images, not {type(images).__name__}; write images=[image]")
        text = self.template.render(prompt, len(images))
        token_ids = self.template.encode(self.tokenizer, text, self._image_token_id)
        manifest = self.bundle.manifest.vision
        # What pruning keeps is known after the vision stage only; the least that it can be is refused here.
        self._check_length(len(token_ids) - len(images) + manifest.num_prefix_tokens * len(images))
        prepared = [self.images.prepare(load_image(image)) for image in images]
        return _Request(token_ids, prepared, _milliseconds_since(started))

    def _embed(self, token_ids: Sequence[int], images: Sequence[EncodedImage]) -> NDArray[np.float32]:
        """The prompt's embeddings [length, hidden], with each image's tokens in place of its placeholder."""
        embeds = self.language.embed(token_ids)
        if not images:
            return embeds
        pieces: list[NDArray[np.float32]] = []
        start = 0
        positions = [position for position, token_id in enumerate(token_ids) if token_id == self._image_token_id]
        for position, image in zip(positions, images, strict=True):
            pieces += [embeds[start:position], image.embeds]
            start = position + 1
        embeds = np.concatenate([*pieces, embeds[start:]])
        self._check_length(len(embeds))
        return embeds

    def _check_length(self, length: int) -> None:
        if length >= self.language.context_length:
            raise PromptError(
                f"the prompt takes {length} tokens, images included; the context of this model holds "
                f"{self.language.context_length}, answer included: shorten the prompt or give fewer images"
            )


@dataclass(frozen=True)
class _Request:
    """A checked request: the prompt's ids, one placeholder per image, and the images' pixels."""

    token_ids: list[int]
    images: list[PreparedImage]
    preprocess_ms: float


class AnswerStream:
    """The pieces of one answer, as they come; made by `Pipeline.stream`.

    Attributes:
        images: what the language model sees of each image; empty until the first piece was asked for.
    """

    def __init__(self, pipeline: Pipeline, request: _Request, max_new_tokens: int, sampler: Sampler) -> None:
        self.images: list[EncodedImage] = []
        self._answer: Answer | None = None
        self._pieces = self._run(pipeline, request, max_new_tokens, sampler)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: the stream is not exhausted.
        """
        if self._answer is None:
            raise RuntimeError("the answer is complete when the stream is exhausted; iterate it first")
        return self._answer

    def _run(self, pipeline: Pipeline, request: _Request, max_new_tokens: int, sampler: Sampler) -> Iterator[str]:
        started = time.perf_counter()
        self.images = pipeline.images.encode(request.images)
        vision_ms = _milliseconds_since(started)

        started = time.perf_counter()
        embeds = pipeline._embed(request.token_ids, self.images)
        tokens = pipeline.language.generate(embeds, max_new_tokens, sampler)
        text = pipeline.tokenizer.stream()
        token_ids: list[int] = []
        pieces: list[str] = []
        step_ms: list[float] = []
        for token_id in tokens:
            step_ms.append(_milliseconds_since(started))
            token_ids.append(token_id)
            if piece := text.push(token_id):
                pieces.append(piece)
                yield piece
            # The time that the caller takes with a piece is not the decoder's.
            started = time.perf_counter()
        if piece := text.finish():
            pieces.append(piece)
            yield piece
        finish_reason: FinishReason = "stop" if pipeline.language.is_end(token_ids[-1]) else "length"
        self._answer = Answer(
            text="".join(pieces),
            token_ids=token_ids,
            num_image_tokens=sum(image.num_unpruned_tokens for image in self.images),
            num_kept_tokens=sum(len(image.embeds) for image in self.images),
            kept_indices=[tile.kept_indices.tolist() for image in self.images for tile in image.tiles],
            finish_reason=finish_reason,
            timings=Timings(
                preprocess_ms=request.preprocess_ms,
                vision_ms=vision_ms,
                prefill_ms=step_ms[0],
                ttft_ms=request.preprocess_ms + vision_ms + step_ms[0],
                decode_ms_per_token=float(np.mean(step_ms[1:])) if len(step_ms) > 1 else None,
            ),
        )


def _read_template(bundle: Bundle) -> PromptTemplate:
    try:
        return PromptTemplate(**bundle.read_json("prompt.json"))
    except TypeError as error:
        raise BundleError(f"the prompt template of {bundle.folder} is damaged: {error}; export it again") from error


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
