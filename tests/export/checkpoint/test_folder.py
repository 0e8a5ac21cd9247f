from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import load_language_model
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def edit_config(folder: Path, edit: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


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


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(model_type="bert"), "type 'bert'; supported is LLaVA-1.5"),
        (lambda config: config.update(model_type="llava_next"), "the first is 'image_newline'"),
        (lambda config: config["text_config"].update(model_type="qwen2"), "language model of type 'qwen2'"),
        (lambda config: config["vision_config"].update(model_type="siglip_vision_model"), "vision tower of type"),
        (lambda config: config.update(vision_feature_layer=[-2, -3]), "several vision feature layers"),
        (lambda config: config.update(vision_feature_layer=-9), "lies outside a tower of 6 layers"),
        (lambda config: config.update(quantization_config={"quant_method": "awq"}), "is quantised (awq)"),
        (lambda config: config["vision_config"].update(hidden_size=96), "has shape"),
        (lambda config: config["text_config"].update(num_hidden_layers=9), "lacks 63 of"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(broken: Path, edit: Callable[[dict], None], message: str) -> None:
    edit_config(broken, edit)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(broken)
    assert message in str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(broken: Path, kept_bytes: int) -> None:
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        Checkpoint.open(broken)


def test_pickled_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        Checkpoint.open(broken)
    (broken / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint.open(broken)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a valid shard index"):
        Checkpoint.open(folder)
