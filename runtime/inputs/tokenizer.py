"""Text to token ids and back, whole or as a stream, from a `tokenizer.json` alone."""

from __future__ import annotations

import contextlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import tokenizers

TOKENIZER_FILE = "tokenizer.json"

# How the ByteFallback decoder spells a token that stands for one byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT_CHARACTER = "\ufffd"

# Decoders that treat the first token apart at most, and otherwise each token (or run of bytes) for itself.
_TOKEN_WISE_DECODERS = {"ByteFallback", "ByteLevel", "Metaspace", "Replace", "WordPiece"}


class Tokenizer:
    """The tokenizer of a language model.

    Args:
        backend: a tokenizer of the Hugging Face tokenizers library. Its padding and truncation are switched
            off, as transformers does: neither belongs to a prompt.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special_tokens = {token.content for token in added if token.special}
        self._is_token_wise = _is_token_wise(backend.decoder)
        self._literals = LiteralTokens(backend, self._special_tokens)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json` from a folder, in a bundle the one named processor/.

        Raises:
            BundleError: the file is missing, or it is no tokenizer.
        """
        import tokenizers

        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the bundle again")
        with _failures(f"{path} cannot be read as a tokenizer"):
            return cls(tokenizers.Tokenizer.from_file(str(path)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text that UTF-8 can encode.
            add_special_tokens: whether to add what the tokenizer puts around a text, such as `<s>` before it.

        Raises:
            BundleError: the tokenizer is damaged in a way that this text shows.
        """
        with _failures("the tokenizer cannot encode this text"):
            if self._literals.are_in(text):
                return self._literals.encode(text, add_special_tokens)
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids

    def escape(self, text: str) -> str:
        """Text in which every special token is a placeholder, which `encode` turns into the ids of its letters.

        The letters of a special token are words like any other where a user wrote them.
        """
        return self._literals.escape(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; special tokens and ids without a token are skipped.

        The text is what transformers gives with `skip_special_tokens=True` and
        `clean_up_tokenization_spaces=False`.
        """
        with _failures("the tokenizer cannot decode these tokens"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
            return text

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None where there is none of that id."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def stream(self) -> TextStream:
        """Start to decode one answer token by token."""
        return TextStream(self)

    def _visible_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None where decoding skips it."""
        token: str | None = self._backend.id_to_token(token_id)
        return None if token in self._special_tokens else token


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn what the library raises into an error that says what to do.

    Raises:
        BundleError: the library failed in the block.
    """
    try:
        yield
    except BaseException as error:
        # The library is written in Rust, whose panics are no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{what} ({error}); tokenizer.json is damaged: export the bundle again") from error


class LiteralTokens:
    """Special tokens that stand in somebody's text, where they mean their letters and nothing else.

    A placeholder takes their place until the text around them is token ids. It is encoded as a token of its own, so
    all that surrounds it is encoded as it would be beside a special token.

    Args:
        backend: a tokenizer of the Hugging Face tokenizers library.
        special_tokens: its special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Iterable[str]) -> None:
        self._backend = backend
        # The longest first, so that of two that begin alike the whole one is found.
        tokens = sorted(special_tokens, key=len, reverse=True)
        # Of a private area of Unicode: whoever writes one of these gets the letters of a special token, and no more.
        self._placeholders = {token: f"\ue000{index}\ue001" for index, token in enumerate(tokens)}
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def escape(self, text: str) -> str:
        """Text with placeholders for its special tokens."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._placeholders[match[0]], text)

    def are_in(self, text: str) -> bool:
        """Whether a text may hold placeholders."""
        return "\ue000" in text

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text with placeholders."""
        ids: list[int] = self._with_placeholders.encode(text, add_special_tokens=add_special_tokens).ids
        return [piece for token_id in ids for piece in self._letters.get(token_id, [token_id])]

    @cached_property
    def _with_placeholders(self) -> tokenizers.Tokenizer:
        return _with_tokens(self._backend.to_str(), self._placeholders.values())

    @cached_property
    def _letters(self) -> dict[int, list[int]]:
        """By the id of a placeholder the ids of the letters that it stands for."""
        spec = json.loads(self._backend.to_str())
        spec["added_tokens"] = []
        # Behind a placeholder, since the start of a text may be encoded in a way of its own.
        [first, *_] = self._placeholders.values()
        plain = _with_tokens(json.dumps(spec), [first])
        letters = {}
        for token, placeholder in self._placeholders.items():
            token_id = self._with_placeholders.token_to_id(placeholder)
            assert token_id is not None, "the placeholders were added"
            _, *letters[token_id] = plain.encode(f"{first}{token}", add_special_tokens=False).ids
        return letters


def _with_tokens(spec: str, tokens: Iterable[str]) -> tokenizers.Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(spec)
    backend.no_padding()
    backend.no_truncation()
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in tokens])
    return backend


class TextStream:
    """The text of one answer while its tokens arrive.

    All that `push` and `finish` return, joined, is `Tokenizer.decode` of all the ids. Text is returned when
    no later token can change it. Two things can: the missing bytes of a character; and, with a ByteFallback
    decoder, any further byte of the same run, since a run that is not UTF-8 as a whole becomes one
    replacement character per byte. With a decoder that looks further ahead all text waits for `finish`.

    `tokenizers.decoders.DecodeStream` gives other text than `decode`: it returns the start of a byte run too
    early, and what is incomplete at the end never.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The first tokens that gave text. What a decoder does to the start of a text (strip a space) it does
        # to them, so what follows them is decoded as in the middle.
        self._context: list[int] = []
        self._num_context_chars = 0
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that has become certain, often one token's, or the empty string."""
        token = self._tokenizer._visible_token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        if not self._tokenizer._is_token_wise or _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT_CHARACTER):
            return ""
        if not self._context:
            self._context, self._num_context_chars = self._pending, len(text)
        self._pending = []
        return text

    def finish(self) -> str:
        """Return the text that still waited, after the last token."""
        text = self._pending_text()
        self._pending = []
        return text

    def _pending_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)[self._num_context_chars :]


def _is_token_wise(decoder: Any) -> bool:
    """Whether a token's text depends on no later token, apart from the bytes of a character or of a run."""
    if decoder is None:
        return True
    spec = json.loads(decoder.__getstate__())
    is_joined = False
    for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        if step["type"] == "Fuse":
            is_joined = True
        elif step["type"] == "Strip":
            if step["stop"] > 0:
                return False
        elif is_joined or step["type"] not in _TOKEN_WISE_DECODERS:
            return False
        else:
            is_joined = step["type"] == "ByteLevel"
    return True
