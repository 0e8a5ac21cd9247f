"""Checkpoints in other layouts, as their makers leave them: each is refused by its name, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from hivtp.export.checkpoint.folder import Checkpoint
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json, rename_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


def refusal_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    # That helps none of these.
    assert "download it again" not in message
    return message


def test_a_config_of_the_original_code_is_read_as_one(broken: Path) -> None:
    """It says more of its vision tower than its name nowhere, see test_original_layout."""
    for key in ({"architectures": ["LlavaLlamaForCausalLM"]}, {"model_type": "llava_mistral"}, {"mm_vision_tower": ""}):
        edit_json(broken / "config.json", lambda config: config.pop("architectures", None), model_type="llava")
        edit_json(broken / "config.json", **key)
        assert "--vision-tower FOLDER" in refusal_of(broken)


def test_weights_of_the_original_layout_under_another_config_are_named(broken: Path) -> None:
    rename_weights(broken, lambda name: name.replace("multi_modal_projector.linear_1", "model.mm_projector.0"))
    assert "layout of the original LLaVA code" in refusal_of(broken)


@pytest.mark.parametrize("has_weights", [True, False])
def test_an_adapter_is_to_be_merged(broken: Path, has_weights: bool) -> None:
    edit_json(broken / "adapter_config.json", base_model_name_or_path="llava-hf/llava-1.5-7b-hf", peft_type="LORA")
    if not has_weights:
        (broken / "config.json").unlink()
        (broken / "model.safetensors").rename(broken / "adapter_model.safetensors")
    message = refusal_of(broken)
    assert "holds an adapter (LoRA" in message
    assert "merge_and_unload()" in message


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_A.default.weight"),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    ],
)
def test_an_adapter_that_is_not_merged_is_named(broken: Path, rename: Callable[[str], str]) -> None:
    rename_weights(broken, lambda name: f"base_model.model.{rename(name)}")
    message = refusal_of(broken)
    assert "an adapter that is not merged" in message
    assert "merge_and_unload()" in message


@pytest.mark.parametrize(
    ("name", "expected", "advice"),
    [
        ("__0_0.distcp", "shards of FSDP", "accelerate merge-weights"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "shards of FSDP", "accelerate merge-weights"),
        ("pytorch_model_fsdp.bin", "shards of FSDP", "accelerate merge-weights"),
        ("zero_to_fp32.py", "shards of DeepSpeed", "zero_to_fp32.py"),
        ("ggml-model-q4_k.gguf", "GGUF weights", "the one that the GGUF was made from"),
        ("consolidated.safetensors", "Mistral's or Meta's own code", "save_pretrained"),
        ("consolidated.00.pth", "Mistral's or Meta's own code", "save_pretrained"),
        ("weights.npz", "weights of MLX", "export the original checkpoint"),
        ("tf_model.h5", "TensorFlow or Flax", "save_pretrained"),
        ("pytorch_model.bin", "only pickled weights, which can carry code", "if you trust it"),
        ("pytorch_model-00001-of-00002.bin", "only pickled weights", "save_pretrained"),
    ],
)
def test_weights_in_other_formats_are_named(broken: Path, name: str, expected: str, advice: str) -> None:
    (broken / name).parent.mkdir(exist_ok=True)
    (broken / "model.safetensors").rename(broken / name)
    message = refusal_of(broken)
    assert f"{expected}" in message
    assert name in message
    assert advice in message


def test_other_formats_beside_safetensors_are_no_matter(broken: Path) -> None:
    for name in ("model.gguf", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "zero_to_fp32.py"):
        (broken / name).write_bytes(b"")
    assert Checkpoint.open(broken).locations


def test_a_folder_without_weights_is_called_that(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "training_args.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds no weights: it has neither model.safetensors nor"):
        Checkpoint.open(broken)


def test_a_bundle_is_called_that(pruned_bundle: Path) -> None:
    assert "looks like a bundle, which hivtp run takes" in refusal_of(pruned_bundle)


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "4 bits"),
        ({"quantization_config": "awq"}, "an unknown method"),
        # MLX writes both.
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits, quantization in its config"),
        ({"quant_config": {"zero_point": True, "w_bit": 4}}, "quant_config"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_whatever_key_says_so(broken: Path, keys: dict, method: str) -> None:
    def edit(config: dict) -> None:
        config["text_config"] |= keys.pop("text_config", {})
        config |= keys

    edit_json(broken / "config.json", edit)
    message = refusal_of(broken)
    assert "is quantised (" in message
    assert method in message
    assert "export the original checkpoint" in message


def test_an_empty_quantisation_is_none(broken: Path) -> None:
    edit_json(broken / "config.json", quantization_config=None, quantization={})
    assert Checkpoint.open(broken).locations


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_of_quantisers_is_noticed(broken: Path, name: str) -> None:
    edit_json(broken / name, bits=4)
    assert f"is quantised, as its {name} says" in refusal_of(broken)


def edit_weight(folder: Path, ending: str, edited: dict[str, Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    [name] = [name for name in weights if name.endswith(ending)]
    del weights[name]
    weights |= {name.removesuffix("weight") + key: tensor for key, tensor in edited.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ({"weight": torch.zeros(96, 64, dtype=torch.float8_e4m3fn)}, "is F8_E4M3"),
        ({"weight": torch.zeros(96, 64, dtype=torch.int8)}, "is I8"),
        ({"weight": torch.zeros(96, 8, dtype=torch.uint32), "scales": torch.zeros(96, 1)}, "scales' shows|is U32"),
        ({"qweight": torch.zeros(8, 96, dtype=torch.int32)}, "qweight' shows"),
        ({"weight_packed": torch.zeros(96, 8, dtype=torch.int32)}, "weight_packed' shows"),
        ({"weight": torch.zeros(96, 64), "weight_scale_inv": torch.zeros(1)}, "weight_scale_inv' shows"),
    ],
)
def test_rounded_weights_are_noticed_without_a_word_in_the_config(broken: Path, edited: dict, message: str) -> None:
    edit_weight(broken, "layers.0.mlp.gate_proj.weight", edited)
    with pytest.raises(CheckpointError, match=f"is quantised.*({message})"):
        Checkpoint.open(broken)


def test_flattened_weights_of_fsdp_are_named(broken: Path) -> None:
    rename_weights(broken, lambda name: name.replace("mlp.gate_proj.weight", "_flat_param"))
    assert "flattened weights of FSDP" in refusal_of(broken)


def test_a_folder_inside_that_may_not_be_read_is_of_no_matter(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "lost+found").mkdir()
    iterdir = type(broken).iterdir

    def refuse(folder: Path) -> object:
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return iterdir(folder)

    monkeypatch.setattr(type(broken), "iterdir", refuse)
    assert Checkpoint.open(broken).locations


def test_a_config_that_names_its_weights_is_refused(broken: Path) -> None:
    edit_json(broken / "config.json", transformers_weights="other.safetensors")
    assert "names its weights in config.json" in refusal_of(broken)
