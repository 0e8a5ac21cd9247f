"""The stages of a bundle: a request prepared, its images encoded, its prompt embedded."""

from __future__ import annotations

import contextlib
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.runtime.answer import Ran
from hivtp.runtime.attempt import request_errors
from hivtp.runtime.inputs.images import image_name, load_image
from hivtp.runtime.inputs.messages import ImagePart
from hivtp.runtime.inputs.prepared_image import PreparedImage
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp.runtime.language import LanguageOptions, RemoteBackend, create_language
from hivtp.runtime.language.base import closed_error
from hivtp.runtime.vision import VisionOptions, create_image_encoder
from hivtp.runtime.vision.encoder import EncodedImage
from hivtp_ops.errors import BundleError, ContextLengthError, EngineError, EngineWarning, HivtpError, ImageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from hivtp.engines.base import Engine
    from hivtp.engines.manifest import LanguageManifest
    from hivtp.runtime.inputs.messages import Message
    from hivtp.runtime.language.base import LanguageBackend
    from hivtp.runtime.language.sampling import SamplingParams
    from hivtp.runtime.request import Request
    from hivtp.runtime.vision.cache import CachedEncoder

# No tokenizer in use has a longer token.
MAX_CHARACTERS_PER_TOKEN = 128


@dataclass(frozen=True)
class PreparedPrompt:
    """A checked request.

    Attributes:
        token_ids: of the whole conversation, one placeholder per image.
        messages: the conversation as the chat template takes it, images without their sources.
        images: in the order of the placeholders: pixels, or what an earlier turn has encoded.
        sampling: resolved.
        preprocess_ms: see Timings.
    """

    token_ids: list[int]
    messages: Sequence[Message]
    images: list[PreparedImage | EncodedImage]
    sampling: SamplingParams
    preprocess_ms: float

    @property
    def pixels(self) -> list[PreparedImage]:
        """The images that are still to be encoded."""
        return [image for image in self.images if not isinstance(image, EncodedImage)]

    def encoded(self, images: Sequence[EncodedImage], vision_ms: float) -> EncodedPrompt:
        """The same after the vision stage, with these in the place of `pixels`."""
        new = iter(images)
        both = [image if isinstance(image, EncodedImage) else next(new) for image in self.images]
        return EncodedPrompt(
            self.token_ids, self.messages, both, list(images), self.sampling, self.preprocess_ms, vision_ms
        )


@dataclass(frozen=True)
class EncodedPrompt:
    """A request whose images went through the vision stage.

    Attributes:
        token_ids, messages, sampling, preprocess_ms: see PreparedPrompt.
        images: one for each placeholder.
        new_images: those of them that this request brought; the others earlier turns of a chat have encoded.
        vision_ms: see Timings.
    """

    token_ids: list[int]
    messages: Sequence[Message]
    images: list[EncodedImage]
    new_images: list[EncodedImage]
    sampling: SamplingParams
    preprocess_ms: float
    vision_ms: float


class Model:
    """The stages of a bundle. Several threads may use it at once.

    Args:
        bundle: what the stages were made from.
        images: images to the embeddings of their kept tokens.
        template: a conversation to the text that the model was trained on.
        tokenizer: text to token ids and back.
        language: embeddings to logits, or conversations to tokens in another server.
    """

    def __init__(
        self,
        bundle: Bundle,
        images: CachedEncoder,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        language: LanguageBackend | RemoteBackend,
    ) -> None:
        self.bundle = bundle
        self.images = images
        self.template = template
        self.tokenizer = tokenizer
        self.language = language
        self._is_closed = False

    @classmethod
    def load(
        cls,
        folder: str | Path,
        vision: VisionOptions,
        language: LanguageOptions,
        *,
        check_hashes: bool = False,
        trust_plans: bool = False,
        vision_engine: Engine | None = None,
    ) -> Model:
        """Load a bundle; see `Pipeline.load`."""
        bundle = Bundle.open(folder, check_hashes=check_hashes)
        with ThreadPoolExecutor(1) as executor:
            # Each engine reads and arranges its weights in one thread, most of the time.
            opened = executor.submit(
                lambda: vision_engine or _open_vision(bundle, vision, language, trust_plans=trust_plans)
            )
            decoder = create_language(bundle, language)
            try:
                template = PromptTemplate.from_json(bundle.read_json("prompt.json"))
                # Its process is up by the time that the vision graph is loaded.
                template.start()
                tokenizer = Tokenizer.load(bundle.processor_folder)
                return cls(bundle, create_image_encoder(bundle, opened.result(), vision), template, tokenizer, decoder)
            except BaseException:
                decoder.close()
                raise

    @property
    def manifest(self) -> LanguageManifest:
        """What the bundle says of its language model."""
        assert self.bundle.manifest.language is not None, "create_language refuses an encoder bundle"
        return self.bundle.manifest.language

    @property
    def ran(self) -> Ran:
        """What computes the answers."""
        return Ran(self.images.description, self.language.description)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.manifest.eos_token_ids

    def prepare(self, request: Request) -> PreparedPrompt:
        """Check and tokenise a request, and read and resize its images.

        Raises:
            ContextLengthError: the prompt is longer than the context.
            EngineError: the model is closed.
            ImageError: an image cannot be read or is refused, and which.
            BundleError: the tokenizer makes tokens that the model does not have.
            OutOfMemoryError: memory ran out.
            PromptError: the template loses words or an image.
            RequestError: a library failed in a way that nobody foresaw.
        """
        with self._request_errors():
            started = time.perf_counter()
            messages = request.messages
            sources = [image for message in messages for image in message.images]
            text = self.template.render(messages, self.tokenizer)
            self._check_text_length(len(text))
            token_ids = self.template.encode(self.tokenizer, text, self.manifest.image_token_id)
            if not 0 <= max(token_ids, default=-1) < self.manifest.vocab_size:
                found = f"token {max(token_ids)}" if token_ids else "no token"
                raise BundleError(
                    f"the tokenizer of {self.bundle.folder} makes {found} of this prompt, and the model has tokens "
                    f"0 to {self.manifest.vocab_size - 1}; export it again"
                )
            # How much pruning keeps is known after the vision stage only; here counts the shortest that it can be.
            self._check_length(len(token_ids) + len(sources) * (self.bundle.manifest.vision.num_prefix_tokens - 1))
            images = [self._prepare_image(source, number, len(sources)) for number, source in enumerate(sources, 1)]
            sampling = request.sampling.resolved(self.manifest.sampling)
            said = [_without_sources(message) for message in self.template.messages(messages)]
            return PreparedPrompt(token_ids, said, images, sampling, milliseconds_since(started))

    def encode(self, prompt: PreparedPrompt) -> EncodedPrompt:
        """Run the vision stage on a request's images.

        Raises:
            EngineError: the engine failed, or the model is closed.
            OutOfMemoryError: memory ran out.
            RequestError: a library failed in a way that nobody foresaw.
            ScoreError: the scores of an image hold NaN.
        """
        started = time.perf_counter()
        images = self.encode_images(prompt.pixels)
        return prompt.encoded(images, milliseconds_since(started))

    def encode_images(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Run the vision stage on images of one request or of several; see `encode`."""
        with self._request_errors():
            return self.images.encode(images)

    def length(self, prompt: EncodedPrompt) -> int:
        """Positions of the prompt, with each image's tokens in place of its placeholder.

        Raises:
            ContextLengthError: they are more than the context has.
            EngineError: the model is closed.
        """
        with self._request_errors():
            length = len(prompt.token_ids) + sum(len(image.embeds) - 1 for image in prompt.images)
            self._check_length(length)
            return length

    def embed(self, prompt: EncodedPrompt) -> NDArray[np.float32]:
        """The prompt's embeddings [length, hidden] float32, for a language model that runs here; none for another.

        Raises:
            EngineError: the model is closed.
            OutOfMemoryError: memory ran out.
        """
        with self._request_errors():
            token_ids = prompt.token_ids
            if isinstance(self.language, RemoteBackend):
                return np.empty((0, 0), np.float32)
            embeds = self.language.embed(token_ids)
            pieces: list[NDArray[np.float32]] = []
            start = 0
            for position, image in zip(self._image_positions(token_ids), prompt.images, strict=True):
                pieces += [embeds[start:position], image.embeds]
                start = position + 1
            return np.concatenate([*pieces, embeds[start:]])

    def keys(self, prompt: EncodedPrompt) -> list[Hashable]:
        """What stands at each position of `embed`: a token id, or the digest of an image."""
        images = iter(prompt.images)
        keys: list[Hashable] = []
        for token_id in prompt.token_ids:
            if token_id == self.manifest.image_token_id:
                image = next(images)
                keys += [image.digest] * len(image.embeds)
            else:
                keys.append(token_id)
        return keys

    def close(self) -> None:
        """Release engines, caches and processes; all that is asked after this raises an EngineError."""
        if not self._is_closed:
            self._is_closed = True
            self.language.close()
            self.images.close()
            self.template.close()

    @contextlib.contextmanager
    def _request_errors(self) -> Iterator[None]:
        """Whatever goes wrong with one request is an error of hivtp, and a model that is closed says so."""
        try:
            with request_errors():
                self._check_open()
                yield
        except HivtpError:
            # The request is not at fault where the model was closed meanwhile.
            self._check_open()
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed_error()

    def _prepare_image(self, source: Any, number: int, num_images: int) -> PreparedImage | EncodedImage:
        if isinstance(source, EncodedImage | PreparedImage):
            return source
        place = f"image {number} of {num_images}: " if num_images > 1 else ""
        try:
            image: Image.Image = load_image(source)
        except ImageError as error:
            raise ImageError(f"{place}{error}") from error
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            # Whatever a caller's object makes Python or Pillow raise.
            raise ImageError(f"{place}the {type(source).__name__} cannot be read as an image: {error}") from error
        try:
            return self.images.prepare(image)
        except ImageError as error:
            raise ImageError(f"{place}{image_name(source)}: {error}") from error

    def _image_positions(self, token_ids: list[int]) -> list[int]:
        return [position for position, token_id in enumerate(token_ids) if token_id == self.manifest.image_token_id]

    def _check_text_length(self, num_characters: int) -> None:
        """Refuse text that cannot fit before all of it is tokenised."""
        most = self.language.context_length * MAX_CHARACTERS_PER_TOKEN
        if num_characters > most:
            raise ContextLengthError(
                f"the prompt has {num_characters} characters, and no more than {most} can fit the context of "
                f"{self.language.context_length} tokens; shorten it"
            )

    def _check_length(self, length: int) -> None:
        if length >= self.language.context_length:
            raise ContextLengthError(
                f"the prompt takes {length} tokens, images and earlier turns included; the context of this model holds "
                f"{self.language.context_length}, answer included: shorten the prompt, give fewer images, or start a "
                "new chat"
            )


def _without_sources(message: Message) -> Message:
    return replace(message, parts=[part if isinstance(part, str) else ImagePart(None) for part in message.parts])


def milliseconds_since(started: float) -> float:
    """From a reading of `time.perf_counter` to now."""
    return (time.perf_counter() - started) * 1e3


def _open_vision(bundle: Bundle, vision: VisionOptions, language: LanguageOptions, *, trust_plans: bool) -> Engine:
    """The engine that runs the vision stage; the tower of a checkpoint where the language model runs in it on a GPU."""
    has_checkpoint = language.backend == "transformers"
    is_on_gpu = has_checkpoint and language.device not in ("auto", "cpu")
    if vision.engine == "transformers" and not has_checkpoint:
        raise EngineError(
            "the vision engine transformers runs the tower of the checkpoint that the language backend transformers "
            "has; choose that backend too, or another engine"
        )
    if vision.engine == "transformers" or (vision.engine == "auto" and is_on_gpu):
        from hivtp.runtime.vision.torch_tower import TransformersVision

        try:
            return TransformersVision(bundle, language)
        except HivtpError as error:
            if vision.engine != "auto":
                raise
            warnings.warn(f"the checkpoint's vision tower cannot run: {error}", EngineWarning, stacklevel=2)
    return open_vision_engine(bundle, vision.engine, vision.engine_settings, trust_plans=trust_plans)
