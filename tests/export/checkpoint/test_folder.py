from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import load_language_model
from hivtp_ops.errors import CheckpointError, HubError
from tests.support.folders import edit_json, rename_weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_and_dtype_gives_the_weights_of_the_model(layout: str, dtype: str, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    folder = make_checkpoint(tmp_path / layout, layout=layout, dtype=dtype, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    checkpoint = Checkpoint.open(folder)
    expected = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).model
    tower = {name.removeprefix("vision_model."): weight for name, weight in expected.vision_tower.named_parameters()}
    for name, weight in checkpoint.part("vision.").items():
        assert torch.equal(weight, tower[name]), name
    for name, weight in expected.multi_modal_projector.named_parameters():
        assert torch.equal(checkpoint.tensor(f"projector.{name}"), weight), name
    language = dict(load_language_model(checkpoint).named_parameters())
    for name, weight in expected.language_model.named_parameters():
        assert torch.equal(language[f"model.{name}"], weight), name


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    text = {"tie_word_embeddings": True}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "tied", text=text, tie_word_embeddings=True))
    assert "language.lm_head.weight" not in checkpoint.locations
    embeddings = checkpoint.tensor("language.model.embed_tokens.weight")
    assert torch.equal(checkpoint.language_tensor("lm_head.weight"), embeddings)


def test_a_head_that_is_stored_counts_though_the_config_ties_it(broken: Path) -> None:
    """As in transformers, which warns of it."""
    from transformers import LlavaForConditionalGeneration

    edit_json(broken / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    expected = LlavaForConditionalGeneration.from_pretrained(broken, dtype=torch.float32).lm_head.weight
    assert torch.equal(Checkpoint.open(broken).language_tensor("lm_head.weight"), expected)
    assert torch.equal(load_language_model(Checkpoint.open(broken)).lm_head.weight, expected)


def test_the_weights_are_those_that_transformers_takes(broken: Path, tmp_path: Path) -> None:
    """Of a whole file beside an index of other weights."""
    from transformers import LlavaForConditionalGeneration

    for file in make_checkpoint(tmp_path / "other", max_shard_size="100KB", seed=1).glob("model*"):
        shutil.copy(file, broken)
    expected = LlavaForConditionalGeneration.from_pretrained(broken, dtype=torch.float32)
    found = Checkpoint.open(broken).language_tensor("lm_head.weight")
    assert torch.equal(found, expected.lm_head.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_weights_that_training_has_wrapped_are_found(broken: Path, prefix: str) -> None:
    expected = Checkpoint.open(broken).tensor("projector.linear_1.weight")
    rename_weights(broken, lambda name: prefix + name)
    assert torch.equal(Checkpoint.open(broken).tensor("projector.linear_1.weight"), expected)


def test_the_fp16_variant_is_found(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "model.fp16.safetensors")
    assert Checkpoint.open(broken).locations["projector.linear_1.weight"]


def test_a_folder_of_the_hubs_cache_is_found(broken: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--llava-hf--tiny"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(broken, cache / "snapshots" / "abc123")
    checkpoint = Checkpoint.open(cache)
    assert checkpoint.folder == cache / "snapshots" / "abc123"
    assert (checkpoint.source.name, checkpoint.source.revision) == ("llava-hf/tiny", "abc123")
    # With two commits, the main branch's.
    shutil.copytree(broken, cache / "snapshots" / "def456")
    with pytest.raises(HubError, match="holds 2 snapshots and no main branch; give one of them"):
        Checkpoint.open(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def456")
    assert Checkpoint.open(cache).source.revision == "def456"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.open(name)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_config", {"hidden_size": 96}, "has shape .* do not belong together"),
        ("text_config", {"num_hidden_layers": 9}, "holds 2 of the 9 layers of its language model, the first weight"),
        ("vision_config", {"num_hidden_layers": 7}, "holds 6 of the 7 layers of its vision tower"),
        ("text_config", {"attention_bias": True}, "lacks the weight 'language.*bias'"),
        ("text_config", {"hidden_size": 10**7}, "has shape"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(broken: Path, part: str, values: dict, message: str) -> None:
    edit_json(broken / "config.json", lambda config: config[part].update(values))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(broken)


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_hundreds_of_thousands_of_layers_are_refused_at_once(broken: Path, part: str) -> None:
    edit_json(broken / "config.json", lambda config: config[part].update(num_hidden_layers=200_000))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="of the 200000 layers"):
        Checkpoint.open(broken)
    assert time.perf_counter() - started < 10


def test_weights_of_another_model_are_called_that(broken: Path) -> None:
    rename_weights(broken, lambda name: f"transformer.{name}")
    with pytest.raises(CheckpointError, match="holds no weight under a name of LLaVA"):
        Checkpoint.open(broken)
