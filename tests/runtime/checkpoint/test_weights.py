from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import Bundle
from hivtp.runtime.checkpoint.weight_files import locate_weights
from hivtp.runtime.checkpoint.weight_names import canonical_name
from hivtp.runtime.checkpoint.weights import CheckpointWeights, open_source
from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable


def opened(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(folder, locate_weights(folder))


def fingerprints(folder: Path) -> tuple[str, str]:
    weights = opened(folder)
    return weights.fingerprint, weights.language_fingerprint


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", "vision.encoder.layers.3.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.3.mlp.fc1.bias", "vision.encoder.layers.3.mlp.fc1.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.weight", "vision.pre_layrnorm.weight"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language.model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "language.lm_head.weight"),
        ("model.language_model.norm.weight", "language.model.norm.weight"),
        ("lm_head.weight", "language.lm_head.weight"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("something.else", None),
    ],
)
def test_names_of_every_published_layout_are_known(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


def test_both_layouts_name_the_same_weights_and_are_one_checkpoint(tmp_path: Path) -> None:
    hub, v5 = (opened(make_checkpoint(tmp_path / layout, layout=layout)) for layout in ("hub", "v5"))
    assert hub.locations.keys() == v5.locations.keys()
    assert {location.name for location in hub.locations.values()} != {
        location.name for location in v5.locations.values()
    }
    assert (hub.fingerprint, hub.language_fingerprint) == (v5.fingerprint, v5.language_fingerprint)


def reindent(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(config.items())), indent=7) + "\n\n")


def shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    names = list(weights)
    index = {}
    for number in range(3):
        held = names[number::3]
        save_file({name: weights[name] for name in held}, folder / f"part-{number}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(held, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def save_again(folder: Path) -> None:
    """As people do who load a model in transformers and save it."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()


def leave_out_defaults(folder: Path) -> None:
    """As the configs on the hub do."""

    def shorten(config: dict[str, Any]) -> None:
        for name in ("attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps", "use_cache", "rope_parameters"):
            del config["text_config"][name]
        for name in ("layer_norm_eps", "hidden_act", "num_channels", "projection_dim", "attention_dropout"):
            del config["vision_config"][name]
        for name in ("projector_hidden_act", "vision_feature_select_strategy", "dtype", "architectures"):
            del config[name]

    edit_config(folder, shorten)


def add_what_does_not_matter(folder: Path) -> None:
    def add(config: dict[str, Any]) -> None:
        config.update(transformers_version="4.37.0", torch_dtype="float16", ignore_index=-100, pad_token_id=0)
        config["text_config"].update(torch_dtype="float16", _name_or_path="lmsys/vicuna-7b-v1.5", pretraining_tp=2)
        config["vision_config"].update(dtype="bfloat16", initializer_range=0.5)

    edit_config(folder, add)


def write_rope_as_before_version_5(folder: Path) -> None:
    def rewrite(config: dict[str, Any]) -> None:
        del config["text_config"]["rope_parameters"]
        config["text_config"].update(rope_theta=10000, rope_scaling=None)

    edit_config(folder, rewrite)


@pytest.mark.parametrize(
    "change",
    [reindent, shard, save_again, leave_out_defaults, add_what_does_not_matter, write_rope_as_before_version_5],
)
def test_a_checkpoint_stays_itself(
    tiny_checkpoint: Path, checkpoint: Path, pruned_bundle: Path, change: Callable[[Path], None]
) -> None:
    change(checkpoint)
    assert fingerprints(checkpoint) == fingerprints(tiny_checkpoint)
    assert open_source(checkpoint, Bundle.open(pruned_bundle).manifest).folder == checkpoint


def test_a_wider_dtype_with_the_same_values_is_the_same_checkpoint(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    narrow = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(narrow, file, {"format": "pt"})
    before = fingerprints(checkpoint)
    save_file({name: weight.float() for name, weight in narrow.items()}, file, {"format": "pt"})
    assert fingerprints(checkpoint) == before


def test_a_head_that_is_the_embedding_table_counts_once(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config["text_config"].update(tie_word_embeddings=True))
    before = fingerprints(checkpoint)
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    [head] = [name for name in weights if name.endswith("lm_head.weight")]
    del weights[head]
    save_file(weights, file, {"format": "pt"})
    assert fingerprints(checkpoint) == before


LANGUAGE, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (LANGUAGE, {"rms_norm_eps": 1e-5}),
        (LANGUAGE, {"hidden_act": "gelu"}),
        (LANGUAGE, {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 32}),
        (LANGUAGE, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        (LANGUAGE, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}),
        (LANGUAGE, {"tie_word_embeddings": True}),
        (VISION, {"num_attention_heads": 4}),
        (VISION, {"layer_norm_eps": 1e-6}),
        (VISION, {"hidden_act": "gelu"}),
        (None, {"vision_feature_layer": -1}),
        (None, {"vision_feature_select_strategy": "full"}),
        (None, {"projector_hidden_act": "relu"}),
    ],
)
def test_a_setting_that_changes_the_computation_makes_another_checkpoint(
    tiny_checkpoint: Path, checkpoint: Path, part: str | None, changes: dict[str, Any]
) -> None:
    edit_config(checkpoint, lambda config: (config if part is None else config[part]).update(changes))
    whole, language = fingerprints(checkpoint)
    assert whole != fingerprints(tiny_checkpoint)[0]
    assert (language != fingerprints(tiny_checkpoint)[1]) == (part == LANGUAGE)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight + 1,
        lambda weight: weight.flip(0),
        lambda weight: torch.cat([weight[: len(weight) // 2], weight[len(weight) // 2 :] * 2]),
        lambda weight: weight.T.contiguous() if weight.ndim == 2 else weight.reshape(2, -1),
    ],
    ids=["other", "turned", "half of it", "shape"],
)
def test_any_weight_that_is_other_makes_another_checkpoint(
    tiny_checkpoint: Path, checkpoint: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    expected = fingerprints(tiny_checkpoint)
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for name in (
        "multi_modal_projector.linear_1.weight",
        "embeddings.patch_embedding.weight",
        "encoder.layers.1.layer_norm1.weight",
        "embed_tokens.weight",
        "layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        [full] = [stored for stored in weights if stored.endswith(name)]
        if torch.equal(weights[full], torch.ones_like(weights[full])) and change(weights[full]).equal(weights[full]):
            continue  # a norm that was never trained looks the same from both ends
        save_file(weights | {full: change(weights[full]).contiguous()}, file, {"format": "pt"})
        found = fingerprints(checkpoint)
        assert found[0] != expected[0]
        assert (found[1] != expected[1]) == (canonical_name(full) or "").startswith("language.")


def test_other_weights_are_refused_as_the_source_of_a_bundle(tmp_path: Path, pruned_bundle: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="is not the checkpoint of this llava bundle, which was exported from"):
        open_source(other, Bundle.open(pruned_bundle).manifest)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": "none"}', b"\xff", b"[" * 10_000])
def test_a_config_that_cannot_be_read_is_a_checkpoint_error(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        _ = opened(checkpoint).fingerprint


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    """Neither is anybody asked about it, who might say yes."""
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    names = {"auto_map": {"AutoConfig": "evil.Config"}}
    edit_config(checkpoint, lambda config: config.update(names))
    _ = opened(checkpoint).fingerprint
    edit_config(checkpoint, lambda config: config.update(names, model_type="unheard-of"))
    with pytest.raises(CheckpointError):
        _ = opened(checkpoint).fingerprint
    assert not (tmp_path / "ran").exists()


def test_weights_that_shrink_are_a_checkpoint_error(checkpoint: Path) -> None:
    weights = opened(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed since the checkpoint was opened"):
        _ = weights.fingerprint
