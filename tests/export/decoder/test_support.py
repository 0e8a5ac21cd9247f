from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, Request, SamplingParams
from hivtp.engines.onnxruntime import open_session
from hivtp.export import exporter
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.decoder.build import load_language_model, write_decoder
from hivtp.export.decoder.model_builder import builder_config, rotations
from hivtp.export.decoder.support import ROPE_TYPES, check_decoder
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.checks import relative_error
from hivtp.export.verify.language import verify_language
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with its own bounds": {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 200,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn with its own factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.8,
    },
}
REFUSED_ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 256,
        "factor": 2.0,
    },
}


def with_rope(folder: Path, rope: dict, language: str = "llama") -> Path:
    text = {"rope_parameters": {"rope_theta": 10000.0, **rope}, "initializer_range": 0.2}
    return make_checkpoint(folder, language=language, text=text)


@pytest.mark.parametrize("language", ["llama", "mistral"])
@pytest.mark.parametrize("name", ROPES)
def test_a_decoder_turns_positions_as_transformers_does(tmp_path: Path, name: str, language: str) -> None:
    checkpoint = Checkpoint.open(with_rope(tmp_path / "checkpoint", ROPES[name], language))
    check_decoder(checkpoint)
    for precision in ("fp32", "int8"):
        report = verify_language(checkpoint, write_decoder(checkpoint, tmp_path / precision, precision), precision)
        assert report["relative_error"] < (1e-5 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("name", ROPES)
def test_a_bundle_answers_as_transformers_does_whatever_its_rope(tmp_path: Path, photo: Path, name: str) -> None:
    from tests.support.reference import HuggingFace

    folder = with_rope(tmp_path / "checkpoint", ROPES[name])
    export_bundle(folder, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    # Far enough that the scaling of positions tells.
    question = "what is the red dog " * 12
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        answer = pipeline.generate(Request(question, [photo], SamplingParams(max_new_tokens=8, temperature=0)))
    assert answer.token_ids == HuggingFace(folder).generate(question, [load_image(photo)], max_new_tokens=8)


def test_the_old_key_of_rope_counts_as_the_new_one(tmp_path: Path) -> None:
    """rope_scaling with type, as transformers 4 wrote it."""
    folder = with_rope(tmp_path / "checkpoint", ROPES["linear"])
    expected = rotations_of(folder)

    def edit(config: dict) -> None:
        text = config["text_config"]
        del text["rope_parameters"]
        text |= {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0}

    edit_json(folder / "config.json", edit)
    assert all(map(torch.equal, rotations_of(folder), expected))


def rotations_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return rotations(load_language_model(Checkpoint.open(folder)), 100)


@pytest.mark.parametrize("name", REFUSED_ROPES)
def test_a_rope_that_no_table_can_hold_is_refused_by_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_rope(tmp_path / "checkpoint", REFUSED_ROPES[name])

    def fail(*_arguments: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(exporter, "build_vision_graph", fail)
    expected = rf"\(RoPE\) of type '{name}'.*{', '.join(ROPE_TYPES)}.*--language-precision none"
    with pytest.raises(CheckpointError, match=expected):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)


def test_a_rope_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    rope = {"rope_type": "spiral", "rope_theta": 10000.0, "factor": 2.0}
    edit_json(folder / "config.json", lambda config: config["text_config"].update(rope_parameters=rope))
    with pytest.raises(CheckpointError, match="spiral"):
        check_decoder(Checkpoint.open(folder))


def test_a_window_in_the_layers_of_a_qwen_is_refused_and_one_that_is_switched_off_is_none(tmp_path: Path) -> None:
    text = {"sliding_window": 20, "max_window_layers": 1}
    off = Checkpoint.open(make_checkpoint(tmp_path / "off", language="qwen2", text=text))
    check_decoder(off)
    assert builder_config(off).sliding_window is None
    on = make_checkpoint(tmp_path / "on", language="qwen2", text={**text, "use_sliding_window": True})
    with pytest.raises(CheckpointError, match=r"use_sliding_window.*--language-precision none"):
        check_decoder(Checkpoint.open(on))


# 8 passes one of the kernel's two checks and not the other.
@pytest.mark.parametrize("head_dim", [4, 8, 24, 40, 72, 88, 100, 120])
def test_a_head_size_without_a_kernel_is_refused_at_the_start(
    tmp_path: Path, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "build_vision_graph", None)
    folder = make_checkpoint(tmp_path / "checkpoint", text={"head_dim": head_dim})
    expected = f"has heads of size {head_dim}, .* multiples of 16.*--language-precision none"
    with pytest.raises(CheckpointError, match=expected):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(language_precision="int4"), is_quiet=True)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512])
def test_a_head_size_that_is_accepted_runs(tmp_path: Path, head_dim: int) -> None:
    text = {"head_dim": head_dim, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    # 512 is also the size of the vocabulary: a projection of that width is not the head.
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", text=text))
    check_decoder(checkpoint)
    for precision in ("fp32", "fp16"):
        report = verify_language(checkpoint, write_decoder(checkpoint, tmp_path / precision, precision), precision)
        assert report["relative_error"] < (1e-5 if precision == "fp32" else 4e-3)


def test_what_a_decoder_cannot_do_transformers_may(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", text={"head_dim": 20})
    bundle = export_bundle(folder, tmp_path / "bundle", ExportSettings(language_precision="none"), is_quiet=True)
    assert bundle.manifest.language.head_size == 20


def test_a_context_whose_table_would_fill_the_memory_is_refused_at_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", text={"max_position_embeddings": 2_000_000})
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"a context of 2000000 positions, .*lower max_position_embeddings"):
        check_decoder(Checkpoint.open(folder))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "text",
    [
        # Of other models: transformers' Llama takes no notice of them, and the builder did.
        {"sliding_window": 5},
        {"partial_rotary_factor": 0.5},
        {"attn_logit_softcapping": 0.01, "final_logit_softcapping": 0.01},
        {"rope_position_scale": 8.0, "seq_length": 64},
        {"original_max_position_embeddings": 64},
        # Of Llama.
        {"attention_bias": True},
        {"mlp_bias": True},
        {"pretraining_tp": 2},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_the_decoder_follows_the_keys_that_transformers_follows(tmp_path: Path, text: dict) -> None:
    known = {name: value for name, value in text.items() if name in ("attention_bias", "mlp_bias", "rms_norm_eps")}
    folder = make_checkpoint(tmp_path / "checkpoint", text={"initializer_range": 0.2, **known})
    edit_json(folder / "config.json", lambda config: config["text_config"].update(text))
    checkpoint = Checkpoint.open(folder)
    check_decoder(checkpoint)
    file = write_decoder(checkpoint, tmp_path, "fp32")
    assert verify_language(checkpoint, file, "fp32")["relative_error"] < 1e-5
    # The reference of that check reads the same config, so the model itself is asked as well.
    embeds = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32) * 0.05
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0, -1].numpy()
    assert relative_error(last_logits(file, embeds), expected) < 1e-5


def last_logits(file: Path, embeds: np.ndarray) -> np.ndarray:
    session = open_session(file)
    inputs = {"inputs_embeds": embeds[None], "attention_mask": np.ones((1, len(embeds)), np.int64)}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            inputs[item.name] = np.zeros((1, 2, 0, 16), np.float32)
    return session.run(["logits"], inputs)[0][0, -1]
