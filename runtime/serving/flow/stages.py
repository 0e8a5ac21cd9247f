"""What happens to a request before it is decoded, each stage in threads of its own, off the event loop."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hivtp.runtime.attempt import request_errors
from hivtp.runtime.inputs.messages import ImagePart, Message
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.model import milliseconds_since
from hivtp.runtime.request import Request
from hivtp.runtime.serving.images.data_uri import EXAMPLE, decode_data_uri
from hivtp.runtime.serving.images.decode import decode_image
from hivtp.runtime.serving.images.fetch import fetch
from hivtp.runtime.serving.protocol.chat_request import parse_chat
from hivtp.runtime.serving.protocol.errors import ApiError, invalid
from hivtp.runtime.serving.protocol.fields import parse_object
from hivtp.runtime.serving.protocol.messages import ImageReference
from hivtp_ops.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hivtp.runtime.inputs.prepared_image import PreparedImage
    from hivtp.runtime.model import EncodedPrompt, Model
    from hivtp.runtime.serving.protocol.chat_request import ChatRequest
    from hivtp.runtime.serving.protocol.messages import ChatMessage
    from hivtp.runtime.serving.settings import ServerSettings
    from hivtp.runtime.vision.encoder import EncodedImage

P = ParamSpec("P")
T = TypeVar("T")
# Parsing, templates and tokens: short work, which must not wait for images.
NUM_TEXT_THREADS = 2


@dataclass
class Work:
    """What has become of one request so far.

    Attributes:
        chat: the request.
        contents: encoded images by where they stand; dropped when they are prepared.
        sizes: (height, width) of each image.
        prepared: images by where they stand.
        preprocess_ms: of decoding and resizing them.
        is_given_up: nobody waits for it any more.
    """

    chat: ChatRequest
    contents: dict[str, bytes] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    prepared: dict[str, PreparedImage] = field(default_factory=dict)
    preprocess_ms: float = 0.0
    is_given_up: bool = False

    @property
    def references(self) -> list[ImageReference]:
        """The images of the whole conversation, in order."""
        return [image for message in self.chat.messages for image in message.images]


class Stages:
    """The stages of a model, each with its threads.

    Args:
        model: whose.
        settings: bounds of images.
    """

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        self._model = model
        self._settings = settings
        self._text = ThreadPoolExecutor(NUM_TEXT_THREADS, "hivtp-text")
        self._images = ThreadPoolExecutor(settings.num_image_threads, "hivtp-images")
        self._vision = ThreadPoolExecutor(1, "hivtp-vision")

    def close(self) -> None:
        """Begin nothing more, and wait for what is on its way."""
        for threads in (self._text, self._images, self._vision):
            threads.shutdown(wait=True, cancel_futures=True)

    async def in_text_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something short; what it raises is an ApiError or a HivtpError, here and in the other threads."""
        return await _run_in(self._text, partial(function, *args, **kwargs))

    async def in_vision_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that uses the vision engine."""
        return await _run_in(self._vision, partial(function, *args, **kwargs))

    async def parse(self, body: bytes) -> Work:
        """Read a request, and the images that stand in it.

        Raises:
            ApiError: it is wrong.
        """
        return await self.in_text_thread(self._parse, body)

    async def fetch(self, work: Work, hold: Callable[[int], None]) -> None:
        """Download the images that do not stand in the request.

        Args:
            work: the request.
            hold: called with the size of each image; what it raises ends the downloads.

        Raises:
            ApiError: see `fetch`.
        """
        for image in work.references:
            if image.param not in work.contents:
                content = await fetch(image.url, image.param, self._settings)
                hold(len(content))
                work.contents[image.param] = content

    async def prepare(self, work: Work) -> None:
        """Decode and resize the images.

        Raises:
            ApiError: an image cannot be used, and which.
            OutOfMemoryError: memory ran out.
        """
        for image in work.references:
            content = work.contents.pop(image.param)
            started = time.perf_counter()
            size, prepared = await _run_in(self._images, partial(self._prepare, content, image.param))
            work.sizes.append(size)
            work.prepared[image.param] = prepared
            work.preprocess_ms += milliseconds_since(started)

    async def encode(self, work: Work, max_tokens: int) -> EncodedPrompt:
        """Tokenise the conversation, and run the vision stage on its images; see `Model.prepare` and `encode`."""
        request = to_request(work.chat, work.prepared, max_tokens)
        prompt = await self.in_text_thread(self._model.prepare, request)
        prompt = replace(prompt, preprocess_ms=prompt.preprocess_ms + work.preprocess_ms)
        # The pixels go with the prompt, which is dropped after the vision stage.
        work.prepared = {}
        if not prompt.pixels:
            return self._model.encode(prompt)
        images, vision_ms = await self.in_vision_thread(self._encode, work, prompt.pixels)
        return prompt.encoded(images, vision_ms)

    def _parse(self, body: bytes) -> Work:
        work = Work(parse_chat(parse_object(body), self._settings))
        work.contents = read_images(work.references, self._settings)
        work.chat = _without_data(work.chat)
        return work

    def _prepare(self, content: bytes, param: str) -> tuple[tuple[int, int], PreparedImage]:
        image = decode_image(content, param, self._settings.max_image_pixels)
        try:
            return (image.height, image.width), self._model.images.prepare(image)
        except ImageError as error:
            raise invalid(f"{param}: {error}", param, "invalid_image") from error

    def _encode(self, work: Work, images: Sequence[PreparedImage]) -> tuple[list[EncodedImage], float]:
        """One after the other, so that a request that is given up costs one image at most."""
        started = time.perf_counter()
        encoded: list[EncodedImage] = []
        for image in images:
            if work.is_given_up:
                break
            encoded += self._model.encode_images([image])
        return encoded, milliseconds_since(started)


async def _run_in(threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, _guarded, function)


def _guarded(function: Callable[[], T]) -> T:
    """Call a function. Memory that runs out and panics of a library are errors of the request that they hit."""
    with request_errors():
        try:
            return function()
        except ApiError as error:
            refusal = error
    raise refusal


def read_images(images: Sequence[ImageReference], settings: ServerSettings) -> dict[str, bytes]:
    """The images that stand in a request, by where they stand; those at an address are left out.

    Raises:
        ApiError: an image is neither, or damaged.
    """
    contents = {}
    for image in images:
        if image.url[:5].lower() == "data:":
            contents[image.param] = decode_data_uri(image.url, image.param, settings.max_image_bytes)
        elif not image.url[:8].lower().startswith(("http://", "https://")):
            # Whatever it is, it never becomes a path.
            message = f"{image.param} must be a data: URI; send {EXAMPLE}, with the base64 after the comma"
            raise invalid(message, image.param, "invalid_image")
    return contents


def to_request(chat: ChatRequest, images: Mapping[str, PreparedImage], max_tokens: int) -> Request:
    """A request as the model takes it.

    Args:
        chat: as the client sent it.
        images: by where they stand in it.
        max_tokens: of the answer, where the request says nothing, or more than this.
    """
    system, messages = folded(chat.messages)
    converted = [
        Message(
            message.role,
            [ImagePart(images[part.param]) if isinstance(part, ImageReference) else part for part in message.parts],
        )
        for message in messages
    ]
    sampling = SamplingParams(
        max_new_tokens=min(chat.max_tokens or max_tokens, max_tokens),
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        repetition_penalty=chat.repetition_penalty,
        seed=chat.seed,
        stop=chat.stop,
        logprobs=chat.logprobs,
        ignores_eos=chat.ignores_eos,
    )
    return Request(converted[-1], sampling=sampling, system=system, history=converted[:-1])


def folded(messages: Sequence[ChatMessage]) -> tuple[str | None, list[ChatMessage]]:
    """What the system says at the start, and the rest; what it says later comes before the user's next words."""
    start = next(place for place, message in enumerate(messages) if message.role != "system")
    system = "\n".join(_text(message) for message in messages[:start])
    folded: list[ChatMessage] = []
    later: list[str] = []
    for message in messages[start:]:
        if message.role == "system":
            later.append(_text(message))
            continue
        if message.role == "user" and later:
            message = replace(message, parts=("\n".join(later) + "\n", *message.parts))
            later = []
        folded.append(message)
    return system or None, folded


def _text(message: ChatMessage) -> str:
    return "".join(part for part in message.parts if isinstance(part, str))


def _without_data(chat: ChatRequest) -> ChatRequest:
    """The request without the text of its images, which are decoded, and may be many megabytes."""
    messages = tuple(
        replace(
            message,
            parts=tuple(
                replace(part, url="data:")
                if isinstance(part, ImageReference) and part.url[:5].lower() == "data:"
                else part
                for part in message.parts
            ),
        )
        for message in chat.messages
    )
    return replace(chat, messages=messages)
