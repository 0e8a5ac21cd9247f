from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.runtime.checkpoint.weight_files import entry_file, locate_weights, shard_names
from hivtp.runtime.checkpoint.weight_names import canonical_name
from hivtp.runtime.checkpoint.weights import CheckpointWeights
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json, rename_weights

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "encoder.layers.3.mlp.fc1.bias"


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        (f"vision_tower.vision_model.{LAYER}", f"vision.{LAYER}"),
        (f"vision_tower.{LAYER}", f"vision.{LAYER}"),
        ("model.vision_tower.vision_model.pre_layrnorm.weight", "vision.pre_layrnorm.weight"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language.model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "language.lm_head.weight"),
        ("model.language_model.norm.weight", "language.model.norm.weight"),
        ("lm_head.weight", "language.lm_head.weight"),
        ("image_newline", "image_newline"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("something.else", None),
        # What training wraps around a model.
        ("module.language_model.lm_head.weight", "language.lm_head.weight"),
        ("module.module.lm_head.weight", "language.lm_head.weight"),
        (f"_orig_mod.vision_tower.{LAYER}", f"vision.{LAYER}"),
        (f"module._orig_mod.model.vision_tower.{LAYER}", f"vision.{LAYER}"),
        ("base_model.model.model.language_model.norm.weight", "language.model.norm.weight"),
        ("base_model.model.lm_head.weight", "language.lm_head.weight"),
        (
            "_fsdp_wrapped_module.model.language_model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.w",
            "language.model.layers.0.mlp.w",
        ),
        ("model.language_model.layers.0._orig_mod.mlp.w", "language.model.layers.0.mlp.w"),
    ],
)
def test_names_of_every_published_and_trained_layout_are_known(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"], "model.safetensors"),
        (["model.safetensors.index.json", "model.safetensors.index.fp16.json"], "model.safetensors.index.json"),
        (["model.fp16.safetensors", "config.json"], "model.fp16.safetensors"),
        (["model.safetensors.index.bf16.json"], "model.safetensors.index.bf16.json"),
        # A shard is not a variant, and neither is another format.
        (["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors"], None),
        ([], None),
    ],
)
def test_weights_are_looked_for_in_the_order_of_transformers(names: list[str], expected: str | None) -> None:
    assert entry_file(names) == expected


def test_several_variants_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"as the variants bf16, fp16 .*rename the files of one"):
        entry_file(["model.fp16.safetensors", "model.safetensors.index.bf16.json"])


def test_a_whole_file_comes_before_an_index(tmp_path: Path, broken: Path) -> None:
    """As transformers does it, whether the index is stale or the file is stray."""
    expected = locate_weights(broken)
    sharded = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB", seed=1)
    for file in sharded.glob("model*"):
        shutil.copy(file, broken)
    assert {location.file.name for location in locate_weights(broken).values()} == {"model.safetensors"}
    assert locate_weights(broken).keys() == expected.keys()
    for file in broken.glob("model-*"):
        file.unlink()
    assert locate_weights(broken).keys() == expected.keys()


def test_a_variant_is_read(broken: Path) -> None:
    expected = locate_weights(broken).keys()
    (broken / "model.safetensors").rename(broken / "model.fp16.safetensors")
    assert locate_weights(broken).keys() == expected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_prefixes_of_training_are_dropped(broken: Path, prefix: str) -> None:
    expected = locate_weights(broken).keys()
    rename_weights(broken, lambda name: prefix + name)
    assert locate_weights(broken).keys() == expected


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "not a valid index of shards: TypeError"),
        ("{}", "KeyError"),
        ('{"weight_map": {}}', "it names none"),
        ('{"weight_map": []}', "AttributeError"),
        ('{"weight_map": {"a": 3}}', "it names 3, expected files inside the folder"),
        ('{"weight_map": {"a": ["x"]}}', "TypeError"),
        ('{"weight_map": {"a": null}}', "it names None"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "it names '../x.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "it names '/etc/passwd'"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "JSONDecodeError"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(index)
    with pytest.raises(CheckpointError, match=message):
        shard_names(file)


def test_a_pipe_in_place_of_a_shard_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.safetensors")
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={"a": "shard.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 1 shards: shard.safetensors"):
        locate_weights(tmp_path)


def test_weights_that_may_not_be_read_are_called_that(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: object, *arguments: object) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    # As for a user who may not read them; the tests may run as root, who may.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: permission denied; let its owner"):
        locate_weights(broken)


def test_a_pointer_of_git_lfs_is_called_that(broken: Path) -> None:
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"is a pointer of Git LFS, .*run git lfs pull"):
        locate_weights(broken)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(broken: Path, kept_bytes: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated .*download it again"):
        locate_weights(broken)


def test_weights_that_change_after_they_were_opened_are_refused(broken: Path) -> None:
    name, file = "language.lm_head.weight", broken / "model.safetensors"
    content = file.read_bytes()

    def opened() -> CheckpointWeights:
        return CheckpointWeights(broken, locate_weights(broken))

    # Exchanged, by one of the same size; shortened; and gone.
    weights = opened()
    (broken / "other").write_bytes(content)
    (broken / "other").replace(file)
    with pytest.raises(CheckpointError, match=r"was changed since the checkpoint was opened.*start again"):
        weights.tensor(name)
    weights = opened()
    os.truncate(file, len(content) // 2)
    with pytest.raises(CheckpointError, match="was changed since the checkpoint was opened"):
        weights.tensor(name)
    file.write_bytes(content)
    weights = opened()
    weights.check_unchanged()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read any more .*it was there when"):
        weights.check_unchanged()


def test_the_index_of_a_checkpoint_names_its_shards(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    names = shard_names(folder / "model.safetensors.index.json")
    assert names == sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) > 1
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(locate_weights(folder)) == len(weight_map)
