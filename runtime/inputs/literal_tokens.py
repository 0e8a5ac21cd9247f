"""Control tokens in somebody's words: there they mean their letters and nothing else."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hivtp.runtime.inputs.tokenizer_library import encode_text, parse_tokenizer
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import tokenizers

# Code points that Unicode never assigns, so nobody's words need them.
_LAST_OF_PLANES = [plane + code for plane in range(0, 0x110000, 0x10000) for code in (0xFFFE, 0xFFFF)]
_NAME, *_MARKS = [*range(0xFDD0, 0xFDF0), *_LAST_OF_PLANES]
_REPLACEMENT_CHARACTER = "\ufffd"


class LiteralTokens:
    """Tells the control tokens that a chat template writes from the same letters in the words of others.

    `escape` puts a mark in the place of one character of every control token, usually `<`. Marked words never spell a
    control token, whatever the template does to them: it may join, cut, strip or replace. `encode` gives the marks
    their characters back; where the words then do spell a control token, it takes a tokenizer in which the control
    tokens have names that no words can spell.

    Args:
        backend: a tokenizer of the Hugging Face tokenizers library.
        tokens: what must not come from words: special tokens, and what a template writes between the words.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokens: Collection[str]) -> None:
        self._backend = backend
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        # The longest first, so that of two that begin alike the whole one is found, as the tokenizer finds it.
        controls = sorted(set(tokens) & added.keys(), key=lambda token: (-len(token), token))
        # Without a letter, so that no normaliser changes it.
        self._names = {token: f"{chr(_NAME)}{index}{chr(_NAME)}" for index, token in enumerate(controls)}
        self._pattern = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        # A token that is looked for in normalised text can be spelled in ways that the pattern does not find.
        self._is_normalized = backend.normalizer is not None and any(added[token].normalized for token in controls)

        marked = _breaking_characters(tokens)
        if len(marked) > len(_MARKS):
            raise BundleError(f"the tokenizer has control tokens that begin with {len(marked)} different characters")
        self._characters = dict(zip(_MARKS, marked, strict=False))
        self._marks = dict.fromkeys([_NAME, *_MARKS], _REPLACEMENT_CHARACTER) | {
            ord(character): chr(mark) for mark, character in self._characters.items()
        }

    def escape(self, text: str) -> str:
        """Words with marks; a code point that Unicode never assigns becomes the replacement character."""
        return text.translate(self._marks)

    def plain(self, text: str) -> str:
        """Text without marks."""
        return text.translate(self._characters)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of text whose words are marked; without control tokens in the words, those of the text as it is."""
        plain = self.plain(text)
        if self._is_normalized or self._spans(text) != self._spans(plain):
            backend = self._renamed
            text = self.plain(self._pattern.sub(lambda match: self._names[match[0]], text))
        else:
            backend, text = self._backend, plain
        return encode_text(backend, text, add_special_tokens)

    def _spans(self, text: str) -> Sequence[tuple[int, int]]:
        return [match.span() for match in self._pattern.finditer(text)]

    @cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with other names for the control tokens, and the same ids."""
        backend = parse_tokenizer(json.dumps(_renamed(json.loads(self._backend.to_str()), self._names)))
        for token, name in self._names.items():
            if backend.token_to_id(name) != self._backend.token_to_id(token):
                raise BundleError(f"the tokenizer cannot be used: {token!r} has another id under another name")
        return backend


def _breaking_characters(tokens: Collection[str]) -> list[str]:
    """As few characters as easily found of which every token has one."""
    found: list[str] = []
    for token in sorted(tokens):
        if token and not any(character in token for character in found):
            signs = (character for character in token if not character.isalnum() and not character.isspace())
            found.append(next(signs, token.strip()[:1] or token[0]))
    return found


def _renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` with other names for some tokens."""
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        # What the letters of a control token would merge into.
        model["merges"] = [
            [left, right] for left, right in model["merges"] if not {left, right, left + right} & names.keys()
        ]
    return spec
