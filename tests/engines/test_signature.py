from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hivtp.engines.bundle import Bundle
from hivtp.engines.onnxruntime import open_session
from hivtp.engines.signature import check_session, decoder_tensors, vision_tensors
from hivtp_ops.errors import BundleError

FILE = Path("model.onnx")


def session(inputs: dict[str, tuple[str, list[Any]]]) -> SimpleNamespace:
    """A session of a graph without outputs."""
    tensors = [SimpleNamespace(name=name, type=kind, shape=shape) for name, (kind, shape) in inputs.items()]
    return SimpleNamespace(get_inputs=lambda: tensors, get_outputs=list)


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "paper"},
        {"preset": "192", "vision_precision": "fp16"},
        {"is_pruned": False, "vision_precision": "int8"},
        {"language_precision": "int4"},
        {"language_precision": "fp16"},
        {"is_pruned": False, "prefill_precision": "w8a8"},
    ],
)
def test_what_the_export_writes_is_what_its_manifest_says(make_bundle, settings):
    bundle = Bundle.open(make_bundle(**settings))
    language = bundle.manifest.language
    check_session(open_session(bundle.vision_file), bundle.vision_file, *vision_tensors(bundle.manifest))
    for name in (language.decoder.file, language.decoder.prefill_file):
        if name is not None:
            file = bundle.folder / name
            check_session(open_session(file), file, *decoder_tensors(language, language.decoder.dtype))


def test_a_decoder_of_other_sizes_is_refused(pruned_bundle):
    bundle = Bundle.open(pruned_bundle)
    language = bundle.manifest.language
    file = bundle.folder / language.decoder.file
    opened = open_session(file)
    for changes, problem in (
        ({"num_layers": 3}, r"inputs .*: 'past_key_values\.2\.key' is missing"),
        ({"num_layers": 1}, r"inputs .*: 'past_key_values\.1\.key' is unknown"),
        ({"num_kv_heads": 4}, r"past_key_values\.0\.key is tensor\(float\) .*, expected tensor\(float\) \[None, 4, "),
        ({"hidden_size": 32}, r"inputs_embeds is tensor\(float\) .*, expected tensor\(float\) \[None, None, 32\]"),
        ({"vocab_size": 513}, r"outputs .*logits is tensor\(float\) .*, expected tensor\(float\) \[None, None, 513\]"),
    ):
        with pytest.raises(BundleError, match=problem):
            check_session(opened, file, *decoder_tensors(replace(language, **changes), "float32"))
    with pytest.raises(BundleError, match=r"is tensor\(float\) .*, expected tensor\(float16\)"):
        check_session(opened, file, *decoder_tensors(language, "float16"))


@pytest.mark.parametrize("shape", [["tiles", 4], [None, 4], ["tiles", "width"], ["tiles", None]])
def test_lengths_that_a_graph_leaves_open_are_not_compared(shape):
    check_session(session({"x": ("tensor(float)", shape)}), FILE, {"x": ("tensor(float)", (None, 4))}, {})


@pytest.mark.parametrize("shape", [["tiles", 5], ["tiles"], [], ["tiles", 4, 1]])
def test_other_lengths_are_refused(shape):
    with pytest.raises(BundleError, match=r"inputs of model\.onnx are not those that the manifest says: x is"):
        check_session(session({"x": ("tensor(float)", shape)}), FILE, {"x": ("tensor(float)", (None, 4))}, {})
