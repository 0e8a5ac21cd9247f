from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp.runtime.inputs.tokenizer_library import decode_ids
from hivtp_ops.errors import BundleError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SENTENCES = [
    "Hello world, this is a picture of a cat.",
    "Ein Bär frißt Äpfel, où ça ? Voilà l'été.",
    "猫在桌子上。日本語の文章です。",
    "Emoji: 🙂🚀👩‍👩‍👧 flags 🇫🇷 and math ∑√.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
LLAMA_DECODERS = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<note>", special=False)])
    return backend


def _llama(decoder: Any) -> Backend:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [
        "▁",
        "▁▁",
        "a",
        "b",
        "c",
        "t",
        "▁a",
        "▁c",
        "at",
        "▁at",
        "cat",
        "▁cat",
        "é",
        "猫",
        "�",
        ".",
        "▁b▁a",
        "",
    ]
    merges = [("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "at"), ("▁", "a"), ("▁", "c"), ("▁", "▁")]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoder
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "byte_level": _byte_level,
    "llama": lambda: _llama(decoders.Sequence(LLAMA_DECODERS)),
    "gemma": lambda: _llama(decoders.Sequence(LLAMA_DECODERS[:3])),
    "strips_two_spaces": lambda: _llama(decoders.Sequence([*LLAMA_DECODERS[:3], decoders.Strip(" ", 2, 0)])),
    "metaspace": lambda: _llama(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace_only": lambda: _llama(decoders.Metaspace()),
    "word_piece": lambda: _llama(decoders.WordPiece("c")),
    "no_decoder": lambda: _llama(None),
    # These look ahead: for the last token, at the next token, and over the joined text.
    "bpe_suffix": lambda: _llama(decoders.BPEDecoder("t")),
    "ctc": lambda: _llama(decoders.CTC("a", "b")),
    "replaces_joined": lambda: _llama(decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "!")])),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, build in BACKENDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        build().save(str(folders[name] / "tokenizer.json"))
    return folders


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


def _reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def _byte_ids(data: bytes) -> list[int]:
    return [len(SPECIAL) + byte for byte in data]


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@pytest.mark.parametrize("text", [*SENTENCES, "", " ", "  a  cat", "<image>\na cat</s> cat", "a\ncat\n"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_is_that_of_transformers(
    folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str, text: str, add_special_tokens: bool
) -> None:
    expected = _reference(folders[name])(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert tokenizers[name].encode(text, add_special_tokens=add_special_tokens) == expected


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@pytest.mark.parametrize("text", SENTENCES)
def test_text_survives_encoding_and_decoding(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    assert tokenizers[name].decode(tokenizers[name].encode(text)) == text


@pytest.mark.parametrize("name", BACKENDS)
def test_decode_is_that_of_transformers_for_any_ids(
    folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    reference = _reference(folders[name])
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = generator.integers(len(reference), size=generator.integers(30)).tolist()
        expected = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizers[name].decode(ids) == expected


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(
    tokenizers: dict[str, Tokenizer], name: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    some_text = st.text("a cat.é猫🙂�\n", max_size=12).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    any_bytes = st.binary(max_size=6).map(_byte_ids)
    any_ids = st.lists(st.integers(0, 340), max_size=6)
    runs = data.draw(st.lists(st.one_of(any_ids, any_bytes, some_text), max_size=8))
    ids = list(itertools.chain.from_iterable(runs))
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@pytest.mark.parametrize("text", SENTENCES)
def test_no_piece_holds_half_a_character(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    pieces = _pieces(tokenizers[name], tokenizers[name].encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_arrives_token_by_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    assert _pieces(tokenizer, tokenizer.encode("a cat at")) == ["", "a", " cat", " at", ""]


def test_a_byte_level_character_arrives_with_its_last_byte(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("🦒", add_special_tokens=False)
    assert len(ids) == 3
    assert _pieces(tokenizer, ids) == ["", "", "🦒", ""]


def test_a_run_of_byte_tokens_waits_for_its_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    cat = tokenizer.encode("cat", add_special_tokens=False)
    run = _byte_ids("桌".encode())
    assert _pieces(tokenizer, [*run, *cat]) == ["", "", "", "桌 cat", ""]
    assert _pieces(tokenizer, [*run, *_byte_ids(b"\xff"), *cat])[-2] == "\ufffd" * 4 + " cat"


@pytest.mark.parametrize("name", ["byte_level", "llama"])
def test_what_is_incomplete_at_the_end_comes_with_finish(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("a🦒", add_special_tokens=False)[:-1]
    pieces = _pieces(tokenizer, ids)
    assert pieces[-1].strip("\ufffd") == ""
    assert "".join(pieces) == tokenizer.decode(ids) != "a"


def test_special_tokens_leave_no_trace_in_a_stream(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    at = tokenizer.encode("at", add_special_tokens=False)
    assert _pieces(tokenizer, [1, *at, 2, 2, *at, 2]) == ["", "at", "", "", " at", "", ""]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder("t"),
        decoders.CTC("a", "b"),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("t", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a▁", "!")]),
    ],
)
def test_a_decoder_that_looks_ahead_streams_at_the_end(decoder: Any) -> None:
    tokenizer = Tokenizer(_llama(decoder))
    ids = tokenizer.encode("a cat", add_special_tokens=False)
    assert _pieces(tokenizer, ids) == ["", "", tokenizer.decode(ids)]


def test_ids_of_numpy_and_ids_without_a_token_decode(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama"]
    ids = [*np.array(tokenizer.encode("a cat")), np.int64(10**6)]
    assert tokenizer.decode(ids) == "a cat"
    assert "".join(_pieces(tokenizer, ids)) == "a cat"


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    backend = _byte_level()
    backend.enable_padding(length=64)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
    assert tokenizer.encode(SENTENCES[0]) == _reference(tmp_path)(SENTENCES[0])["input_ids"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


# The last makes the library panic, which is not an Exception.
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be used: ") as raised:
        Tokenizer.load(tmp_path)
    assert raised.value.__cause__ is not None


def test_a_pipe_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="it is not a regular file"):
        Tokenizer.load(tmp_path)


def test_what_the_library_cannot_do_is_an_error_of_ours() -> None:
    backend = _llama(None)
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(lambda: None)
    with pytest.raises(PromptError, match="the tokenizer cannot encode this text"):
        Tokenizer(backend).encode("a cat")
    backend = _byte_level()
    backend.decoder = decoders.Decoder.custom(lambda: None)
    with pytest.raises(BundleError, match="the tokenizer cannot decode"):
        decode_ids(backend, [5, 6])


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, hivtp.runtime.inputs.tokenizer, hivtp.runtime.inputs.prompt, hivtp.runtime.language.sampling\n"
        "print([name for name in ('tokenizers', 'jinja2', 'transformers', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
