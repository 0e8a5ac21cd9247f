"""What a bundle makes of a question and of images, compared with what transformers makes of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.export.verify.samples import sample_files
from hivtp.runtime.request import Request
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hivtp.export.checkpoint.processor import Processor
    from hivtp.runtime.model import Model

QUESTION = "What is in the image?"
# Pixels are normalised to a few units; float32 rounds them otherwise in another order of operations.
MAX_PIXEL_DIFFERENCE = 1e-4


def check_inputs(model: Model, processor: Processor) -> list[int]:
    """Compare what the vision graph and the language model are fed with; returns the question's token ids."""
    token_ids: list[int] = []
    for name, content in sample_files().items():
        prompt = model.prepare(Request(QUESTION, [content]))
        token_ids = prompt.token_ids
        [image] = prompt.pixels
        expected = _expected_pixels(processor, content)
        found = image.pixel_values
        if found.shape != expected.shape or not np.abs(found - expected).max() <= MAX_PIXEL_DIFFERENCE:
            raise VerificationError(
                f"the bundle prepares {name} otherwise than transformers: {_difference(found, expected)}; nothing was "
                "written. The image processor of this checkpoint is not supported; please report it"
            )
    expected_ids = _expected_ids(processor)
    if expected_ids is not None and token_ids != expected_ids:
        raise VerificationError(
            f"the bundle makes {token_ids} of {QUESTION!r}, and transformers makes {expected_ids}; nothing was "
            "written. The tokenizer or chat template of this checkpoint is not supported; please report it"
        )
    return token_ids


def _expected_pixels(processor: Processor, content: bytes) -> NDArray[np.float32]:
    """The tiles [tiles, 3, side, side] that transformers makes of an image file."""
    from PIL import Image
    from transformers.image_utils import load_image

    image = load_image(Image.open(io.BytesIO(content)))
    pixels: NDArray[np.float32] = np.asarray(
        processor.original.image_processor([image], return_tensors="np")["pixel_values"]
    )
    return pixels if pixels.ndim == 4 else pixels[0]


def _expected_ids(processor: Processor) -> list[int] | None:
    """The token ids that transformers makes of the question, one for the image.

    None where its template loses the question or the image in whatever form it gets them.
    """
    template, image_token = processor.prompt["chat_template"], processor.prompt["image_token"]
    bos_token = processor.prompt["tokens"].get("bos_token")
    if template is None:
        texts = [f"USER: {image_token}\n{QUESTION} ASSISTANT:"]
    else:
        # Most templates take the parts of a message; some take text alone, in which the image is its token.
        contents = ([{"type": "image"}, {"type": "text", "text": QUESTION}], f"{image_token}\n{QUESTION}")
        texts = [text for content in contents if (text := _rendered(processor, template, content)) is not None]
    for text in texts:
        if text.count(image_token) == 1 and QUESTION in text:
            has_bos_token = bos_token is not None and text.startswith(bos_token)
            ids: list[int] = processor.tokenizer(text, add_special_tokens=not has_bos_token)["input_ids"]
            return ids
    return None


def _rendered(processor: Processor, template: str, content: Any) -> str | None:
    try:
        text = processor.original.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception:  # noqa: BLE001  a template is a stranger's program, and raises what it likes
        return None
    return text if isinstance(text, str) else None


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> str:
    if found.shape != expected.shape:
        return f"pixels of shape {list(found.shape)}, expected {list(expected.shape)}"
    return f"a pixel differs by {np.abs(found - expected).max():.3g}"
