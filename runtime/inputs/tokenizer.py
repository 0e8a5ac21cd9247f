"""Text to token ids and back, whole or as a stream, from a `tokenizer.json` alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import MAX_JSON_BYTES, read_regular
from hivtp.runtime.inputs.literal_tokens import LiteralTokens
from hivtp.runtime.inputs.tokenizer_library import decode_ids, encode_text, parse_tokenizer
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        backend: see `parse_tokenizer`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special_tokens = {token.content for token in added if token.special}
        # Not whitespace, which a template writes as part of its text.
        self._other_tokens = {token.content for token in added if token.content.strip()} - self._special_tokens
        self._is_token_wise = _is_token_wise(backend.decoder)
        self._literals: dict[tuple[str, frozenset[str]], LiteralTokens] = {}

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json` from a folder, in a bundle the one named processor/.

        Raises:
            BundleError: the file is missing, or is not a tokenizer.
        """
        path = Path(folder) / TOKENIZER_FILE
        try:
            content = read_regular(path, MAX_JSON_BYTES).decode()
            return cls(parse_tokenizer(content))
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing; export the bundle again") from error
        except (OSError, ValueError, BundleError) as error:
            raise BundleError(f"{path} cannot be used: {error}; copy or export the bundle again") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text that UTF-8 can encode; special tokens in it become their ids.
            add_special_tokens: whether to add what the tokenizer puts around a text, such as `<s>` before it.

        Raises:
            BundleError: the tokenizer is damaged in a way that this text shows.
        """
        return encode_text(self._backend, text, add_special_tokens)

    def literal_tokens(self, written: str, tokens: frozenset[str]) -> LiteralTokens:
        """Encode text in which somebody's words must not become control tokens.

        Control tokens are the special tokens, and those that a template uses like them: some checkpoints do not flag
        `<|im_start|>` as special.

        Args:
            written: what the template writes; an added token in it is a control token.
            tokens: further control tokens.
        """
        key = (written, tokens)
        if key not in self._literals:
            others = {token for token in self._other_tokens if token in written}
            self._literals[key] = LiteralTokens(self._backend, self._special_tokens | others | tokens)
        return self._literals[key]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; special tokens and ids without a token are skipped.

        The text is what transformers gives with `skip_special_tokens=True` and
        `clean_up_tokenization_spaces=False`.
        """
        return decode_ids(self._backend, list(ids))

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
