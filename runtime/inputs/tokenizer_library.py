"""The Hugging Face tokenizers library, with errors that name what failed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import BundleError, HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tokenizers


def parse_tokenizer(content: str) -> tokenizers.Tokenizer:
    """Make a tokenizer of the content of a `tokenizer.json`.

    Its padding and truncation are switched off, as transformers does: neither belongs to a prompt.

    Raises:
        BundleError: it is not a tokenizer, or one that cannot work.
    """
    import tokenizers

    with _library_errors(BundleError, "it cannot be read as a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(content)
        backend.no_padding()
        backend.no_truncation()
    return backend


def encode_text(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        PromptError: the tokenizer cannot encode it.
    """
    with _library_errors(PromptError, "the tokenizer cannot encode this text"):
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def decode_ids(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    """Text of token ids, without special tokens and ids that have no token.

    Raises:
        BundleError: the tokenizer cannot decode them.
    """
    with _library_errors(BundleError, "the tokenizer cannot decode its own tokens"):
        text: str = backend.decode(ids, skip_special_tokens=True)
    return text


@contextlib.contextmanager
def _library_errors(kind: type[HivtpError], message: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        # A panic of the library, which a damaged file can cause, is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{message}: {error}") from error
        raise
