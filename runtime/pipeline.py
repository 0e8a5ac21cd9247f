"""The pipeline: images and a prompt in, an answer out, at once or piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import EngineSettings, create_engine
from hivtp.engines.bundle import Bundle
from hivtp.runtime.answer import Answer, FinishReason, Timings
from hivtp.runtime.image_processor import ImageProcessor
from hivtp.runtime.images import load_image
from hivtp.runtime.language import LanguageBackend, create_language
from hivtp.runtime.prompt import PromptTemplate
from hivtp.runtime.sampling import Sampler, SamplingSettings
from hivtp.runtime.tokenizer import Tokenizer
from hivtp.runtime.vision import EncodedTile, VisionStage
from hivtp_ops.errors import BundleError, CheckpointError, PromptError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.runtime.images import ImageSource

DEFAULT_MAX_NEW_TOKENS = 256


class Pipeline:
    """Answers prompts about images with the stages that it is given. Several threads may use it at once.

    Args:
        bundle: what the stages were made from.
        image_processor: pictures to pixels.
        template: a prompt to the text that the model was trained on.
        tokenizer: text to token ids and back.
        vision: pixels to the embeddings of the kept tokens.
        language: embeddings to tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        image_processor: ImageProcessor,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        vision: VisionStage,
        language: LanguageBackend,
    ) -> None:
        assert bundle.manifest.language is not None, "an encoder bundle has no pipeline"
        self.bundle = bundle
        self.image_processor = image_processor
        self.template = template
        self.tokenizer = tokenizer
        self.vision = vision
        self.language = language
        self._image_token_id = bundle.manifest.language.image_token_id

    @classmethod
    def load(
        cls, folder: str | Path, *, num_threads: int | None = None, check_hashes: bool = False
    ) -> Pipeline:
        """Load a bundle that hivtp-export wrote; needs numpy and onnxruntime, not torch.

        Args:
            folder: the bundle.
            num_threads: threads of each engine; None leaves the choice to the engine.
            check_hashes: also compare every file's sha256 with the manifest.

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
            _read_image_processor(bundle),
            PromptTemplate(**_read_json(bundle, "prompt.json")),
            Tokenizer.load(bundle.processor_folder),
            VisionStage(create_engine("onnxruntime", bundle.vision_file, settings), manifest.vision),
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
            raise PromptError(
                f"images must be a list of images, not {type(images).__name__}; write images=[image]"
            )
        text = self.template.render(prompt, len(images))
        token_ids = self.template.encode(self.tokenizer, text, self._image_token_id)
        manifest = self.bundle.manifest.vision
        # What pruning keeps is known after the vision stage only; the least that it can be is refused here.
        self._check_length(len(token_ids) - len(images) + manifest.num_prefix_tokens * len(images))
        pixel_values = self.image_processor([load_image(image) for image in images]) if images else None
        return _Request(token_ids, pixel_values, started, _milliseconds_since(started))

    def _embed(self, token_ids: Sequence[int], tiles: Sequence[EncodedTile]) -> NDArray[np.float32]:
        """The prompt's embeddings [length, hidden], with each image's tokens in place of its placeholder."""
        embeds = self.language.embed(token_ids)
        if not tiles:
            return embeds
        pieces: list[NDArray[np.float32]] = []
        start = 0
        positions = [
            position for position, token_id in enumerate(token_ids) if token_id == self._image_token_id
        ]
        for position, tile in zip(positions, tiles, strict=True):
            pieces += [embeds[start:position], tile.embeds]
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
    pixel_values: NDArray[np.float32] | None
    started: float
    preprocess_ms: float


class AnswerStream:
    """The pieces of one answer, as they come; made by `Pipeline.stream`.

    Attributes:
        tiles: what the vision stage kept, one item per image; empty until the first piece was asked for.
    """

    def __init__(self, pipeline: Pipeline, request: _Request, max_new_tokens: int, sampler: Sampler) -> None:
        self.tiles: list[EncodedTile] = []
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

    def _run(
        self, pipeline: Pipeline, request: _Request, max_new_tokens: int, sampler: Sampler
    ) -> Iterator[str]:
        started = time.perf_counter()
        if request.pixel_values is not None:
            self.tiles = pipeline.vision.encode(request.pixel_values)
        vision_ms = _milliseconds_since(started)

        started = time.perf_counter()
        embeds = pipeline._embed(request.token_ids, self.tiles)
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
        manifest = pipeline.bundle.manifest.vision
        self._answer = Answer(
            text="".join(pieces),
            token_ids=token_ids,
            num_image_tokens=manifest.num_image_tokens * len(self.tiles),
            num_kept_tokens=sum(len(tile.embeds) for tile in self.tiles),
            kept_indices=[tile.kept_indices.tolist() for tile in self.tiles],
            finish_reason=finish_reason,
            timings=Timings(
                preprocess_ms=request.preprocess_ms,
                vision_ms=vision_ms,
                prefill_ms=step_ms[0],
                ttft_ms=request.preprocess_ms + vision_ms + step_ms[0],
                decode_ms_per_token=float(np.mean(step_ms[1:])) if len(step_ms) > 1 else None,
            ),
        )


def _read_image_processor(bundle: Bundle) -> ImageProcessor:
    try:
        return ImageProcessor.from_config(_read_json(bundle, "image_processor.json"))
    except CheckpointError as error:
        raise BundleError(f"the image preprocessing of {bundle.folder} is not supported: {error}") from error


def _read_json(bundle: Bundle, name: str) -> dict[str, Any]:
    file = bundle.processor_folder / name
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {file}: {error}; copy or export the bundle again") from error
    return content


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
