from __future__ import annotations

import base64
import importlib.util
import io
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.checkpoints import WORDS, make_checkpoint
from hivtp import Pipeline, Request, SamplingParams
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import CheckpointError, MissingExtraError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def open_processor(folder: Path) -> Processor:
    return Processor.open(Checkpoint.open(folder))


def add_token(folder: Path, token: str, token_id: int, *, special: bool) -> None:
    def edit(tokenizer: dict) -> None:
        tokenizer["added_tokens"].append(
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
        )

    edit_json(folder / "tokenizer.json", edit)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_embeddings_is_refused(broken: Path, special: bool) -> None:
    add_token(broken, "<|pad|>", 512, special=special)
    with pytest.raises(CheckpointError, match=r"has '<\|pad\|>' as token 512, and the embeddings end with token 511"):
        open_processor(broken)


def test_an_image_token_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", text={"vocab_size": 500})
    add_token(folder, "<picture>", 500, special=True)
    edit_json(folder / "processor_config.json", image_token="<picture>")
    edit_json(folder / "config.json", image_token_index=500)
    with pytest.raises(CheckpointError, match="has '<picture>' as token 500, and the embeddings end with token 499"):
        open_processor(folder)


def test_an_image_token_of_another_id_is_refused(broken: Path) -> None:
    edit_json(broken / "config.json", image_token_index=7)
    with pytest.raises(CheckpointError, match=r"the id 511, .* image_token_index is 7"):
        open_processor(broken)


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    """A tokenizer.model of 400 pieces, of the kind of Llama 2."""
    import sentencepiece

    written = io.BytesIO()
    words = [word for word in WORDS if word.isalnum()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[first:] + words[:first]) for first in range(len(words))]),
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()


@pytest.fixture
def sentencepiece_checkpoint(tmp_path: Path, vocabulary: bytes) -> Path:
    """One whose tokenizer is tokenizer.model alone, as the first conversions were."""
    folder = make_checkpoint(tmp_path / "checkpoint", text={"initializer_range": 0.2})
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    image = {"content": "<image>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        added_tokens_decoder={"400": {**image, "special": True}},
    )
    edit_json(folder / "config.json", image_token_index=400)
    return folder


def test_a_tokenizer_model_alone_answers_as_transformers_does(
    sentencepiece_checkpoint: Path, tmp_path: Path, photo: Path
) -> None:
    from tests.support.reference import HuggingFace

    export_bundle(sentencepiece_checkpoint, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        sampling = SamplingParams(max_new_tokens=8, temperature=0)
        answer = pipeline.generate(Request("What is red?\nblue  é", [photo], sampling))
    from hivtp.runtime.inputs.images import load_image

    reference = HuggingFace(sentencepiece_checkpoint)
    expected = reference.generate("What is red?\nblue  é", [load_image(photo)], max_new_tokens=8)
    assert answer.token_ids == expected


def test_without_sentencepiece_its_extra_is_named(
    sentencepiece_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sentencepiece" else found(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"sentencepiece is not installed; .*hivtp\[export\]"):
        open_processor(sentencepiece_checkpoint)


def test_a_vocabulary_of_tiktoken_is_called_that(broken: Path) -> None:
    """Llama 3's tokenizer.model is one."""
    (broken / "tokenizer.json").unlink()
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (broken / "tokenizer.model").write_text("".join(lines))
    with pytest.raises(
        CheckpointError, match=r"is a vocabulary of tiktoken.*where the model was published.*with tiktoken and"
    ):
        open_processor(broken)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_vocabulary_is_refused(broken: Path, content: bytes) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.model").write_bytes(content)
    edit_json(broken / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, and transformers cannot make"):
        open_processor(broken)


def test_without_any_vocabulary_the_file_that_is_wanted_is_named(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_processor(broken)
    assert "has no tokenizer.json, and transformers cannot make a tokenizer of its other files" in str(caught.value)
    # Neither helps, though the library suggests it.
    assert "tiktoken" not in str(caught.value)
