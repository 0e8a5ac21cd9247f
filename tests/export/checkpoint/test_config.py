from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.export.checkpoint.config import VISION_ACTIVATIONS, read_config
from hivtp.export.graph.activation import activation
from hivtp.export.graph.builder import GraphBuilder
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(model_type="bert"), "type 'bert'; supported is LLaVA-1.5"),
        (lambda config: config.update(model_type="vipllava"), "type 'vipllava'; supported is"),
        (
            lambda config: config.update(model_type="llava_onevision", vision_aspect_ratio="anyres"),
            "vision_aspect_ratio is 'anyres'; expected anyres_max_ and a number",
        ),
        (lambda config: config.update(model_type=["llava"]), r"type \['llava'\]; supported is"),
        (lambda config: config.pop("model_type"), "type None; supported is"),
        (lambda config: config["text_config"].update(model_type="gemma"), "language model of type 'gemma'; supported"),
        (lambda config: config["vision_config"].update(model_type="dinov2"), "vision tower of type 'dinov2'"),
        (
            lambda config: config["vision_config"].update(model_type="siglip_vision_model"),
            "the first patch would be left out",
        ),
        (lambda config: config.update(vision_feature_layer=[-2, -3]), "several vision feature layers"),
        (lambda config: config.update(vision_feature_layer=-9), "lies outside a tower of 6 layers"),
        (lambda config: config.update(model_type="llava_next"), "image_grid_pinpoints is .*in multiples of 64"),
        (lambda config: config.update(projector_hidden_act="swoosh"), "a projector with 'swoosh' activation"),
        (lambda config: config["vision_config"].update(hidden_act="swoosh"), "vision tower with 'swoosh' activation"),
        (lambda config: config["text_config"].update(hidden_act="swoosh"), "language model with 'swoosh' activation"),
        (
            lambda config: config["vision_config"].update(patch_size=0),
            "patch_size of its vision_config is 0; expected 1",
        ),
        (lambda config: config["vision_config"].update(patch_size=65), "image size smaller than its patch size"),
        (lambda config: config["vision_config"].update(num_channels=1), "a vision tower of 1 colour channels"),
        (lambda config: config["vision_config"].update(num_attention_heads=0), "num_attention_heads of its vision"),
        (
            lambda config: config["vision_config"].update(num_attention_heads=5),
            "not a multiple of the number of attention heads",
        ),
        (lambda config: config["text_config"].update(num_key_value_heads=3), "key-value heads do not divide"),
        (lambda config: config["text_config"].update(vocab_size=-1), "vocab_size of its text_config is -1; expected 1"),
        (lambda config: config["text_config"].update(hidden_size=10**30), "hidden_size of its text_config is 1000"),
        (lambda config: config["text_config"].update(head_dim=0), "head_dim of its text_config is 0"),
        (lambda config: config["text_config"].update(hidden_size="64"), "hidden_size of its text_config is '64'"),
        (lambda config: config.update(text_config=[]), "not a valid LLaVA config"),
        (lambda config: config.update(vision_config="clip"), "not a valid LLaVA config"),
        (lambda config: config["text_config"].update(rope_parameters="yarn"), "not a valid LLaVA config"),
        (lambda config: config.update(vision_feature_layer="x"), "not a valid LLaVA config"),
    ],
)
def test_a_config_that_cannot_be_exported_is_refused_by_name(
    broken: Path, edit: Callable[[dict], None], message: str
) -> None:
    edit_json(broken / "config.json", edit)
    with pytest.raises(CheckpointError, match=message):
        read_config(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "holds a JSON list, expected an object"),
        ('"llava"', "holds a JSON str, expected an object"),
        ("", "cannot be read as JSON"),
        ('{"model_type": "llava"', "cannot be read as JSON"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(broken: Path, content: str, message: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(broken)


def test_a_config_that_is_not_text_or_not_a_file_is_refused(broken: Path) -> None:
    file = broken / "config.json"
    file.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(broken)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        read_config(broken)


@pytest.mark.parametrize("name", VISION_ACTIVATIONS)
def test_the_activations_that_are_accepted_can_be_built(name: str) -> None:
    def read(_name: str) -> Any:
        raise AssertionError("an activation has no weights")

    graph = GraphBuilder(read, "fp32")
    value = graph.input("value", "FLOAT", ["tiles", 4])
    assert activation(graph, name, value, "activation") is not None
