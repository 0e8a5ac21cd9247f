"""The pipeline: images and a prompt in, an answer out, at once or piece by piece."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

from hivtp.engines import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.runtime.answer_stream import AnswerStream, milliseconds_since
from hivtp.runtime.batch import answer_batch
from hivtp.runtime.chat import Chat
from hivtp.runtime.device_rows import concatenate
from hivtp.runtime.embedding_cache import DEFAULT_CACHE_BYTES, EmbeddingCache
from hivtp.runtime.image_encoder import open_image_encoder
from hivtp.runtime.language import (
    BackendName,
    LanguageBackend,
    LanguageDtype,
    LanguageSettings,
    check_backend,
    create_language,
)
from hivtp.runtime.lookahead import answer_each
from hivtp.runtime.outcome import memory_errors
from hivtp.runtime.prepared_image import prepare_images
from hivtp.runtime.prompt import PromptTemplate
from hivtp.runtime.request import GenerationSettings, Request
from hivtp.runtime.sampling import Sampler
from hivtp.runtime.tiling import MAX_TILES
from hivtp.runtime.tokenizer import Tokenizer
from hivtp.runtime.vision import DEFAULT_MAX_TILES_PER_RUN, VisionStage
from hivtp_ops.errors import BundleError, HivtpError, PromptError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.runtime.answer import Answer
    from hivtp.runtime.device_rows import Embeddings
    from hivtp.runtime.image_encoder import EncodedImage, ImageEncoder
    from hivtp.runtime.images import ImageSource
    from hivtp.runtime.prepared_image import PreparedImage
    from hivtp.runtime.prompt import Turn


class Pipeline:
    """Answers prompts about images with the stages that it is given.

    Several threads may use one pipeline at once: each answer is the one that it gives alone, and the image cache is
    shared. An AnswerStream or a Chat belongs to one thread at a time, as does a PIL image that is not decoded yet.

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
        self.image_token_id = bundle.manifest.language.image_token_id

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        engine: str = "auto",
        num_threads: int | None = None,
        uses_cuda_graph: bool = False,
        vision_compile: bool = EngineSettings.is_compiled,
        check_hashes: bool = False,
        max_tiles_per_run: int = DEFAULT_MAX_TILES_PER_RUN,
        max_tiles: int = MAX_TILES,
        image_cache_bytes: int = DEFAULT_CACHE_BYTES,
        language: BackendName = LanguageSettings.backend,
        checkpoint: str | Path | None = LanguageSettings.checkpoint,
        language_device: str = LanguageSettings.device,
        language_dtype: LanguageDtype = LanguageSettings.dtype,
        language_compile: bool = LanguageSettings.is_compiled,
    ) -> Pipeline:
        """Load a bundle that hivtp-export wrote; needs numpy and onnxruntime, and torch where something runs in it.

        Args:
            folder: the bundle.
            engine: what runs the vision graph: "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "torch"
                or "torch-cuda"; "auto" takes a TensorRT plan that fits, else ONNX Runtime on a GPU, else on the CPU
                (for a bf16 graph torch, on a GPU or on the CPU), and warns of what is there and cannot be used.
            num_threads: threads of each engine on the CPU; None leaves the choice to the engine.
            uses_cuda_graph: see EngineSettings.
            vision_compile: for "torch" and "torch-cuda": see EngineSettings.is_compiled.
            check_hashes: also compare every file's sha256 with the manifest.
            max_tiles_per_run: more tiles than this go through the vision graph in several runs: fewer take less
                memory.
            max_tiles: LLaVA-NeXT: a picture that becomes more tiles than this, its base tile included, is refused.
            image_cache_bytes: memory for the embeddings of pictures seen before; 0 keeps none.
            language: what decodes the answers: "onnxruntime" the bundle's decoder, where it has one;
                "transformers" the language model of `checkpoint`. The vision graph runs in `engine` either way.
            checkpoint: for "transformers": the Hugging Face folder that the bundle was exported from.
            language_device: where answers are decoded. For "onnxruntime" "cpu" or "cuda"; "auto" takes a GPU where the
                decoder is float16 and CUDA works. For "transformers" as torch names it; "auto" is the CPU.
            language_dtype: for "transformers": float32, bfloat16 or float16.
            language_compile: for "transformers": compile the model, and on a GPU run it as CUDA graphs. Each length of
                prompt that is new costs seconds to minutes; see TransformersLanguage.

        Raises:
            BundleError: the bundle is incomplete, altered, of another schema, or lacks what `language` needs of it.
            CheckpointError: the checkpoint is damaged, or is not the one that the bundle was exported from.
            MissingExtraError: onnxruntime, or what `engine` or `language` needs in its place, is not installed.
            EngineError: a graph cannot be loaded, or the engine cannot run here.
            SettingsError: a setting cannot work.
        """
        settings = EngineSettings(num_threads, uses_cuda_graph)
        language_settings = LanguageSettings(
            language, settings, checkpoint, language_device, language_dtype, language_compile
        )
        vision_settings = replace(settings, is_compiled=vision_compile)
        bundle = Bundle.open(folder, check_hashes=check_hashes)
        check_backend(bundle, language)
        vision = VisionStage.open(bundle, vision_settings, max_tiles_per_run, engine)
        decoder = create_language(bundle, language_settings)
        return cls(
            bundle,
            open_image_encoder(
                bundle,
                vision.leaving_rows_on(decoder.rows_device),
                EmbeddingCache(image_cache_bytes),
                max_tiles,
            ),
            _read_template(bundle),
            Tokenizer.load(bundle.processor_folder),
            decoder,
        )

    def generate(
        self, prompt: str, images: Sequence[ImageSource] = (), **settings: Unpack[GenerationSettings]
    ) -> Answer:
        """Answer a prompt; see `stream` for the arguments and errors."""
        stream = self.stream(prompt, images, **settings)
        for _piece in stream:
            pass
        return stream.answer

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), **settings: Unpack[GenerationSettings]
    ) -> AnswerStream:
        """Answer a prompt piece by piece.

        Args:
            prompt: the question; `<image>` marks say where the images stand, a single image needs none.
            images: paths, encoded bytes, PIL images or uint8 arrays.
            **settings: max_new_tokens, temperature, top_p, top_k and seed, as in Request.

        Returns:
            An iterator of text pieces; when it is exhausted, its `answer` is complete. Input is checked here,
            the model runs as the pieces are asked for.

        Raises:
            ImageError: an image cannot be read or is refused.
            OutOfMemoryError: memory ran out; also from the stream.
            PromptError: the prompt is empty, does not fit the images, or is longer than the context.
            SettingsError: a setting cannot work.
        """
        request = Request(prompt, images, **settings)
        prepared = self.prepare(prompt, images)
        sampler = Sampler(request.sampling)

        def decode(encoded: list[EncodedImage]) -> Iterator[int]:
            embeds = self.embed(prepared, encoded)
            return self.language.generate(embeds, request.max_new_tokens, sampler)

        return AnswerStream(self, prepared, decode)

    def generate_batch(self, requests: Sequence[Request]) -> list[Answer | HivtpError]:
        """Answer several requests together: one vision batch, then one decoder step for all of them.

        Each answer is the one that its request gives alone. The timings of an answer are those of its request
        where it has its own (preprocess_ms, prefill_ms), and else those of what was done together: vision_ms
        is that of all images, decode_ms_per_token the mean of the joint steps that the request took part in.
        ttft_ms is their sum as ever; the time that a request waited for others is in none.

        Returns:
            For each request its answer, or the error that it alone failed with: what `stream` raises, or an
            EngineError or OutOfMemoryError. It costs no other request its answer.

        Raises:
            PromptError: `requests` is no list; what is in it fails for itself alone.
        """
        if isinstance(requests, str) or not isinstance(requests, Sequence):
            raise PromptError(f"requests must be a list of Request, not {type(requests).__name__}")
        return answer_batch(self, requests)

    def generate_each(self, requests: Iterable[Request]) -> Generator[Answer | HivtpError]:
        """Answer requests in order; while one is decoded, a thread prepares the pictures of the next.

        The thread takes the next request at the first token of the present one, reads, resizes and encodes its
        pictures, and goes no further. Each answer is the one that its request gives alone. That gains where the two
        want different processors, as with a vision graph on a GPU; on a CPU that both share it cost a tenth with the
        miniature (`benchmarks/lookahead.py` measures it).

        preprocess_ms and vision_ms are the times of these stages themselves, hidden or not. ttft_ms counts from where
        the answer was asked for, or its request taken if that is later, so it holds what was left to wait of them.

        Args:
            requests: what to ask, as it comes; it is iterated in the thread.

        Returns:
            Each request's answer, or the error that it alone failed with: what `stream` raises. What iterating
            `requests` raises is raised in its place. Closing the iterator waits for the picture in work.

        Raises:
            PromptError: `requests` cannot be iterated.
        """
        if isinstance(requests, str | bytes) or not isinstance(requests, Iterable):
            raise PromptError(f"requests must be an iterable of Request, not {type(requests).__name__}")
        return answer_each(self, requests)

    def chat(self) -> Chat:
        """Begin a conversation, in which further questions cost their own tokens only."""
        return Chat(self)

    def prepare(self, prompt: str, images: Sequence[ImageSource], history: Sequence[Turn] = ()) -> PreparedPrompt:
        """Check and tokenise a prompt, and read and resize its images; see `stream` for the errors.

        Args:
            prompt: of the newest turn.
            images: likewise.
            history: the turns before it; their images are not prepared again.
        """
        started = time.perf_counter()
        if isinstance(images, str | bytes) or not isinstance(images, Sequence):
            raise PromptError(f"images must be a list of images, not {type(images).__name__}; write images=[image]")
        text = self.template.render(prompt, len(images), history)
        token_ids = self.template.encode(self.tokenizer, text, self.image_token_id)
        manifest = self.bundle.manifest.vision
        # What pruning keeps is known after the vision stage only; the least that it can be is refused here.
        num_images = token_ids.count(self.image_token_id)
        self._check_length(len(token_ids) + num_images * (manifest.num_prefix_tokens - 1), len(history))
        with memory_errors():
            prepared = prepare_images(self.images, images)
        return PreparedPrompt(token_ids, prepared, len(history), milliseconds_since(started))

    def embed(self, prompt: PreparedPrompt, images: Sequence[EncodedImage]) -> Embeddings:
        """The prompt's embeddings [length, hidden], with each image's tokens in place of its placeholder.

        Args:
            prompt: the text.
            images: one for each placeholder, those of earlier turns included.

        Raises:
            PromptError: they are longer than the context.
        """
        token_ids = prompt.token_ids
        embeds = self.language.embed(token_ids)
        if not images:
            return embeds
        pieces: list[Embeddings] = []
        start = 0
        positions = [position for position, token_id in enumerate(token_ids) if token_id == self.image_token_id]
        for position, image in zip(positions, images, strict=True):
            pieces += [embeds[start:position], image.embeds]
            start = position + 1
        embeds = concatenate([*pieces, embeds[start:]])
        self._check_length(len(embeds), prompt.num_earlier_turns)
        return embeds

    def _check_length(self, length: int, num_earlier_turns: int) -> None:
        if length >= self.language.context_length:
            included = "images and earlier turns included" if num_earlier_turns else "images included"
            advice = "start a new chat" if num_earlier_turns else "shorten the prompt or give fewer images"
            raise PromptError(
                f"the prompt takes {length} tokens, {included}; the context of this model holds "
                f"{self.language.context_length}, answer included: {advice}"
            )


@dataclass(frozen=True)
class PreparedPrompt:
    """A checked prompt.

    Attributes:
        token_ids: of the whole conversation, one placeholder per image.
        images: the pixels of this turn's images.
        num_earlier_turns: turns before this one.
        preprocess_ms: see Timings.
    """

    token_ids: list[int]
    images: list[PreparedImage]
    num_earlier_turns: int
    preprocess_ms: float


def _read_template(bundle: Bundle) -> PromptTemplate:
    try:
        return PromptTemplate(**bundle.read_json("prompt.json"))
    except TypeError as error:
        raise BundleError(f"the prompt template of {bundle.folder} is damaged: {error}; export it again") from error
