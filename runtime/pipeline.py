"""The pipeline: images and a prompt in, an answer out, at once or piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from hivtp.runtime.answer_stream import AnswerStream
from hivtp.runtime.attempt import attempt
from hivtp.runtime.chat import Chat
from hivtp.runtime.generation import Generation, decode_together, finished, scheduler_for, steps_of
from hivtp.runtime.hub.bundle import bundle_folder
from hivtp.runtime.language import LanguageOptions
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.model import Model, milliseconds_since
from hivtp.runtime.prefetch import Prefetch
from hivtp.runtime.remote_check import check_remote
from hivtp.runtime.request import Request
from hivtp.runtime.vision import VisionOptions
from hivtp_ops.errors import HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path
    from types import TracebackType

    from hivtp.engines.base import Engine
    from hivtp.runtime.answer import Answer
    from hivtp.runtime.inputs.images import ImageSource
    from hivtp.runtime.prepared_prompt import EncodedPrompt, PreparedPrompt


class Pipeline:
    """Answers prompts about images.

    Several threads may use one pipeline at once: each answer is the one that it gives alone, and the image cache is
    shared. An AnswerStream or a Chat belongs to one thread at a time, as does a PIL image that is not decoded yet.

    Args:
        model: the stages of a bundle.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        vision: VisionOptions | None = None,
        language: LanguageOptions | None = None,
        revision: str | None = None,
        check_hashes: bool = False,
        trust_plans: bool = False,
        vision_engine: Engine | None = None,
    ) -> Self:
        """Load a bundle that `hivtp export` wrote; needs numpy and one inference engine.

        Args:
            bundle: its folder, or its id on the Hugging Face hub (owner/name), from where it is downloaded. A folder
                that exists comes first.
            vision: how images are encoded.
            language: how answers are decoded.
            revision: of a bundle on the hub: a branch, tag or commit; None is the main branch.
            check_hashes: also compare every file's sha256 with the manifest.
            trust_plans: load a TensorRT plan that came with the bundle. A plan is code: without this, only one that
                this machine built is loaded.
            vision_engine: runs the vision graph in place of the engine that `vision` names.

        Raises:
            BundleError: the bundle is incomplete, altered, of another schema, or lacks what `language` needs of it.
            CheckpointError: the checkpoint is damaged, or is not the one that the bundle was exported from.
            HubError: a bundle of the hub cannot be downloaded.
            MissingExtraError: onnxruntime, or what an engine or backend needs in its place, is not installed.
            EngineError: a graph cannot be loaded, or the engine cannot run here; or a server that is to decode cannot.
            OutOfMemoryError: the model does not fit into the memory of the device.
            SettingsError: an option cannot work.
        """
        options = (vision or VisionOptions(), language or LanguageOptions())
        folder = bundle_folder(bundle, revision)
        model = Model.load(
            folder, *options, check_hashes=check_hashes, trust_plans=trust_plans, vision_engine=vision_engine
        )
        try:
            check_remote(model)
        except BaseException:
            model.close()
            raise
        return cls(model)

    def close(self) -> None:
        """Release engines, caches and processes; whatever is asked after this raises an EngineError.

        An answer that is being streamed ends with that error, too, and holds its own memory until it is dropped.
        """
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompt: str | Request,
        images: Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
        *,
        system: str | None = None,
    ) -> Answer:
        """Answer a prompt; see `stream` for the arguments and errors."""
        stream = self.stream(prompt, images, sampling, system=system)
        for _piece in stream:
            pass
        return stream.answer

    def stream(
        self,
        prompt: str | Request,
        images: Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
        *,
        system: str | None = None,
    ) -> AnswerStream:
        """Answer a prompt piece by piece.

        Args:
            prompt: the question; `<image>` marks say where the images stand, and a single image needs none. Or a whole
                Request, and then nothing else.
            images: paths, encoded bytes, PIL images or uint8 arrays.
            sampling: how the tokens are chosen, and where the answer ends.
            system: what the model is told before the question.

        Returns:
            An iterator of text pieces; when it is exhausted, its `answer` is complete. Input is checked here,
            the model runs as the pieces are asked for.

        Raises:
            EngineError: an engine failed, or the pipeline is closed; also from the stream.
            ImageError: an image cannot be read or is refused.
            OutOfMemoryError: memory ran out; also from the stream.
            PromptError: the prompt is empty, does not fit the images, or is longer than the context.
            RequestError: a library failed in a way that nobody foresaw; also from the stream.
            ScoreError: the scores of an image hold NaN; from the stream.
            SettingsError: a setting cannot work.
        """
        if isinstance(prompt, Request):
            has_images = not isinstance(images, Sequence) or len(images) > 0
            if has_images or sampling is not None or system is not None:
                raise PromptError("a Request holds images, sampling and system; give nothing beside it")
            request = prompt
        else:
            request = Request(prompt, images, SamplingParams() if sampling is None else sampling, system)
        return AnswerStream(self.model, self.model.prepare(request))

    def generate_batch(self, requests: Sequence[Request]) -> list[Answer | HivtpError]:
        """Answer several requests together: one vision batch, then one decoder step for all of them.

        Each answer is the one that its request gives alone. The timings of an answer are those of its request
        where it has its own (preprocess_ms, prefill_ms), and else those of what was done together: vision_ms
        is that of all images, decode_ms_per_token the mean of the joint steps that the request took part in.
        ttft_ms is their sum; the time that a request waited for others is in none.

        Returns:
            For each request its answer, or the error that it alone failed with. It costs no other request its answer.

        Raises:
            PromptError: `requests` is not a list; what is in it fails for itself alone.
        """
        if isinstance(requests, str | bytes) or not isinstance(requests, Sequence):
            raise PromptError(f"requests must be a list of Request, not {type(requests).__name__}")
        results = [
            prompt if isinstance(prompt, HivtpError) else attempt(Generation, self.model, prompt)
            for prompt in self._encode_batch(requests)
        ]
        decode_together(self.model, [result for result in results if isinstance(result, Generation)])
        return [result if isinstance(result, HivtpError) else attempt(finished, result) for result in results]

    def generate_each(self, requests: Iterable[Request]) -> Generator[Answer | HivtpError]:
        """Answer requests in order; while one is decoded, a thread prepares the images of the next.

        The thread takes the next request at the first token of the present one, reads, resizes and encodes its
        images, and goes no further. Each answer is the one that its request gives alone. That gains where the two
        want different processors, as with a vision graph on a GPU; on a CPU that both share it cost a tenth with the
        miniature (`benchmarks/speed/prefetch.py` measures it).

        preprocess_ms and vision_ms are the times of these stages themselves, hidden or not. ttft_ms counts from when
        the answer was asked for, or its request taken if that is later, so it holds what was left to wait of them.

        Args:
            requests: what to ask, as it comes; it is iterated in the thread.

        Returns:
            Each request's answer, or the error that it alone failed with: what `stream` raises. What iterating
            `requests` raises is raised in its place. Closing the iterator waits for the image that is being encoded.

        Raises:
            PromptError: `requests` cannot be iterated.
        """
        if isinstance(requests, str | bytes) or not isinstance(requests, Iterable):
            raise PromptError(f"requests must be an iterable of Request, not {type(requests).__name__}")
        return self._generate_each(requests)

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation, in which further questions cost their own tokens only.

        Args:
            system: what the model is told before it.
        """
        return Chat(self.model, system)

    def _encode_batch(self, requests: Sequence[Request]) -> list[EncodedPrompt | HivtpError]:
        """Each request with its images encoded, all in one batch, or one by one where that fails."""
        prepared = [attempt(self._prepare, request) for request in requests]
        prompts = [prompt for prompt in prepared if not isinstance(prompt, HivtpError)]
        started = time.perf_counter()
        together = attempt(self.model.encode_images, [image for prompt in prompts for image in prompt.pixels])
        vision_ms = milliseconds_since(started)

        def encoded(prompt: PreparedPrompt | HivtpError) -> EncodedPrompt | HivtpError:
            if isinstance(prompt, HivtpError):
                return prompt
            if isinstance(images, HivtpError):
                return attempt(self.model.encode, prompt)
            return prompt.encoded([next(images) for _ in prompt.pixels], vision_ms)

        images = together if isinstance(together, HivtpError) else iter(together)
        return [encoded(prompt) for prompt in prepared]

    def _prepare(self, request: Request) -> PreparedPrompt:
        if not isinstance(request, Request):
            raise PromptError(f"a batch holds a Request for each answer, not a {type(request).__name__}")
        return self.model.prepare(request)

    def _generate_each(self, requests: Iterable[Request]) -> Generator[Answer | HivtpError]:
        with Prefetch(lambda request: self.model.encode(self._prepare(request)), requests) as prefetch:
            asked_at = time.perf_counter()
            while (item := prefetch.take()) is not None:
                # The next request is taken at the first token, so its images are encoded while this one decodes.
                result = attempt(_answer_one, self.model, item.result, max(asked_at, item.taken_at), prefetch.begin)
                # Nothing of it is held while the caller works with the answer.
                del item
                # Where there was no first token, the next request has not begun yet.
                prefetch.begin()
                yield result
                asked_at = time.perf_counter()


def _answer_one(
    model: Model, result: EncodedPrompt | HivtpError, started_at: float, at_first_token: Callable[[], object]
) -> Answer:
    if isinstance(result, HivtpError):
        raise result
    generation = Generation(model, result)
    ttft_ms = None
    for _ in steps_of(scheduler_for(model, [generation]), generation):
        if ttft_ms is None and generation.has_begun:
            ttft_ms = milliseconds_since(started_at)
            at_first_token()
    answer = generation.answer()
    assert ttft_ms is not None, "an answer has a token"
    return replace(answer, timings=replace(answer.timings, ttft_ms=ttft_ms))
