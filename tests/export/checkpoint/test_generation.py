from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest

from hivtp import Pipeline, Request, SamplingParams
from hivtp.engines.manifest import SamplingDefaults
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.generation import GenerationDefaults
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp_ops.errors import CheckpointError, CheckpointWarning
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path


def defaults_of(folder: Path) -> GenerationDefaults:
    checkpoint = Checkpoint.open(folder)
    return GenerationDefaults.of(checkpoint, Processor.open(checkpoint).tokenizer)


def written(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_json(folder / "generation_config.json", **values)
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingDefaults()),
        # Without do_sample the rest is of no effect.
        ({"temperature": 0.2, "top_p": 0.5, "top_k": 3}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0.2}, SamplingDefaults()),
        # transformers draws from the 50 best tokens where nothing is said.
        ({"do_sample": True}, SamplingDefaults(1.0, 1.0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingDefaults(0.6, 0.9, 50, 1.0)),
        ({"do_sample": True, "top_k": 0, "temperature": 1}, SamplingDefaults(1.0, 1.0, 0, 1.0)),
        ({"repetition_penalty": 1.2}, SamplingDefaults(repetition_penalty=1.2)),
        ({"do_sample": True, "top_k": 5, "repetition_penalty": 2}, SamplingDefaults(1.0, 1.0, 5, 2.0)),
    ],
)
def test_sampling_is_resolved_as_transformers_does(broken: Path, values: dict, expected: SamplingDefaults) -> None:
    found = defaults_of(written(broken, eos_token_id=2, **values))
    assert found.sampling == expected
    assert found.ignored == ()
    # What transformers' generate would take, by its own resolution.
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(broken)
    theirs, _ = model._prepare_generation_config(None)
    if theirs.do_sample:
        assert (theirs.temperature, theirs.top_p, theirs.top_k) == (
            expected.temperature,
            expected.top_p,
            expected.top_k,
        )
    else:
        assert expected.temperature == 0
    assert theirs.repetition_penalty == expected.repetition_penalty


def test_a_penalty_of_the_checkpoint_changes_the_answer_as_in_transformers(
    broken: Path, tmp_path: Path, photo: Path
) -> None:
    from hivtp.runtime.inputs.images import load_image
    from tests.support.reference import HuggingFace

    image, answers = load_image(photo), []
    for name, penalty in (("plain", 1.0), ("penalised", 1.8)):
        written(broken, eos_token_id=2, repetition_penalty=penalty)
        export_bundle(broken, tmp_path / name, ExportSettings(is_pruned=False), is_quiet=True)
        with Pipeline.load(tmp_path / name) as pipeline:
            answer = pipeline.generate(Request("What is red?", [photo], SamplingParams(max_new_tokens=12)))
        expected = HuggingFace(broken).generate("What is red?", [image], max_new_tokens=12)
        assert answer.token_ids == expected
        answers.append(expected)
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("values", "ignored"),
    [
        ({"no_repeat_ngram_size": 3}, ("no_repeat_ngram_size",)),
        ({"suppress_tokens": [1, 2], "bad_words_ids": [[3]]}, ("bad_words_ids", "suppress_tokens")),
        ({"forced_eos_token_id": 2, "num_beams": 4}, ("num_beams", "forced_eos_token_id")),
        ({"min_new_tokens": 5, "stop_strings": ["x"]}, ("min_new_tokens", "stop_strings")),
        ({"do_sample": True, "min_p": 0.1}, ("min_p",)),
        # Of no effect, all of them.
        ({"min_p": 0.1, "no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": []}, ()),
        ({"max_length": 4096, "max_new_tokens": 100, "use_cache": False, "pad_token_id": 0}, ()),
    ],
)
def test_what_is_not_followed_is_named_in_a_warning(
    broken: Path, tmp_path: Path, values: dict, ignored: tuple[str, ...]
) -> None:
    written(broken, eos_token_id=2, **values)
    assert defaults_of(broken).ignored == ignored
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_bundle(broken, tmp_path / "bundle", ExportSettings(language_precision="none"), is_quiet=True)
    messages = [str(item.message) for item in caught if item.category is CheckpointWarning]
    assert len(messages) == bool(ignored)
    assert all(name in message for message in messages for name in ignored)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0, expected more than 0"),
        ({"repetition_penalty": "high"}, "repetition_penalty"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"do_sample": True, "temperature": -1}, "temperature"),
        ({"do_sample": True, "top_p": 2}, "top_p"),
        ({"do_sample": True, "top_k": 1.5}, "top_k 1.5"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"eos_token_id": 512}, "names 512 as eos_token_id, and its vocabulary has the tokens 0 to 511"),
        ({"eos_token_id": [2, "x"]}, "names 'x' as eos_token_id"),
        ({"eos_token_id": True}, "names True as eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "as eos_token_id"),
    ],
)
def test_values_that_cannot_work_are_refused(broken: Path, values: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        defaults_of(written(broken, **values))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '"x"', ""])
def test_a_file_that_is_not_an_object_is_refused(broken: Path, content: str) -> None:
    (broken / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        defaults_of(broken)


def test_the_end_of_an_answer_is_found_where_the_file_says_nothing(broken: Path) -> None:
    assert defaults_of(written(broken, eos_token_id=[2, 5])).eos_token_ids == (2, 5)
    edit_json(broken / "config.json", lambda config: config["text_config"].update(eos_token_id=7))
    assert defaults_of(written(broken)).eos_token_ids == (7,)
    (broken / "generation_config.json").unlink()
    assert defaults_of(broken).eos_token_ids == (7,)
    edit_json(broken / "config.json", lambda config: config["text_config"].update(eos_token_id=None))
    assert defaults_of(broken).eos_token_ids == (2,)
    edit_json(broken / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    with pytest.raises(
        CheckpointError, match="names no end-of-sequence token; add eos_token_id to its generation_conf"
    ):
        defaults_of(broken)
