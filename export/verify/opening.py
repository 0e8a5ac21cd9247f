"""The last check of an export: the bundle is opened as its users open it, and asked about an image."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from hivtp.engines import open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp.export.verify.inputs import QUESTION, check_inputs
from hivtp.export.verify.samples import sample_files, sample_pixels
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp.runtime.language import RemoteBackend
from hivtp.runtime.language.options import LanguageOptions
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.model import Model
from hivtp.runtime.pipeline import Pipeline
from hivtp.runtime.request import Request
from hivtp.runtime.vision import create_image_encoder
from hivtp.runtime.vision.options import VisionOptions
from hivtp_ops.errors import EngineWarning, HivtpError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.checkpoint.processor import Processor
    from hivtp.runtime.language.base import Slots

# The first comes from the prompt, the second from a decode step.
NUM_TOKENS = 2
# float16 holds 11 bits of a token's embedding.
MAX_EMBEDDING_ERROR = 1e-3


def open_and_ask(folder: Path, checkpoint: Checkpoint, processor: Processor | None) -> None:
    """Open a bundle with the runtime, and ask it a question about an image.

    What it makes of the question and of images is compared with what transformers makes of them.

    Args:
        folder: the bundle, not yet in its place.
        checkpoint: what it was exported from.
        processor: of the checkpoint; None for an encoder bundle, whose graph runs once.

    Raises:
        VerificationError: it cannot be opened or asked, or takes its inputs otherwise than transformers.
    """
    try:
        with warnings.catch_warnings():
            # That an engine of this machine is slow for the graph is said to those who run it.
            warnings.simplefilter("ignore", EngineWarning)
            bundle = Bundle.open(folder)
            if processor is None:
                _run_encoder(bundle)
            elif bundle.manifest.language is None or bundle.manifest.language.decoder is None:
                _encode_only(bundle, processor)
            else:
                _answer(bundle, checkpoint, processor)
    except VerificationError:
        raise
    except HivtpError as error:
        raise VerificationError(f"the bundle cannot be used: {error}; nothing was written") from error


def _answer(bundle: Bundle, checkpoint: Checkpoint, processor: Processor) -> None:
    options = VisionOptions(engine="onnxruntime", cache_bytes=0)
    with Pipeline.load(bundle.folder, vision=options, language=LanguageOptions(device="cpu")) as pipeline:
        token_ids = check_inputs(pipeline.model, processor)
        _check_embeddings(pipeline.model, checkpoint, token_ids)
        sampling = SamplingParams(max_new_tokens=NUM_TOKENS, ignores_eos=True)
        pipeline.generate(QUESTION, [next(iter(sample_files().values()))], sampling)


def _encode_only(bundle: Bundle, processor: Processor) -> None:
    """Everything but the answer, for a bundle whose language model is in the checkpoint."""
    options = VisionOptions(engine="onnxruntime", cache_bytes=0)
    engine = open_vision_engine(bundle, "onnxruntime")
    template = PromptTemplate.from_json(bundle.read_json("prompt.json"))
    tokenizer = Tokenizer.load(bundle.processor_folder)
    model = Model(bundle, create_image_encoder(bundle, engine, options), template, tokenizer, _NoLanguage(bundle))
    try:
        check_inputs(model, processor)
        model.encode(model.prepare(Request(QUESTION, [next(iter(sample_files().values()))])))
    finally:
        model.close()


def _run_encoder(bundle: Bundle) -> None:
    vision = bundle.manifest.vision
    outputs = open_vision_engine(bundle, "onnxruntime").run({"pixel_values": sample_pixels(1, vision.image_size)})
    shape = (1, vision.num_image_tokens, vision.hidden_size)
    found = outputs["features"]
    if found.shape != shape or not np.isfinite(found).all():
        raise VerificationError(
            f"the encoder graph gives features of shape {list(found.shape)}, expected finite ones of {list(shape)}; "
            "nothing was written"
        )


def _check_embeddings(model: Model, checkpoint: Checkpoint, token_ids: list[int]) -> None:
    expected = checkpoint.language_tensor("model.embed_tokens.weight")[np.array(token_ids)].float().numpy()
    assert not isinstance(model.language, RemoteBackend), "a bundle is opened with its own decoder"
    found = model.language.embed(token_ids)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error <= MAX_EMBEDDING_ERROR:
        raise VerificationError(
            f"the bundle's token embeddings differ from the checkpoint's by {error:.3g} of the largest; nothing was "
            "written"
        )


class _NoLanguage:
    """A language backend of which only the size of the context is asked."""

    description = "nothing"
    kv_bytes_per_position = 0

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.manifest.language is not None, "an encoder bundle answers no prompts"
        self.context_length = bundle.manifest.language.context_length

    def embed(self, *_arguments: object) -> NDArray[np.float32]:
        raise AssertionError("there is no language model")

    def open_slots(self, *_arguments: object) -> Slots:
        raise AssertionError("there is no language model")

    def close(self) -> None:
        """Nothing was opened."""
