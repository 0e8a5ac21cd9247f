"""A bundle may be a stranger's: whatever its files hold, it works or is refused, soon and in bounded memory."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from hivtp import Pipeline, SamplingParams
from hivtp.engines.bundle import Bundle
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp_ops.errors import BundleError, EngineError, HivtpError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_tokenizer_of_any_size_is_not_read(bundle, record_file):
    with (bundle / "processor/tokenizer.json").open("ab") as file:
        file.truncate(300 * 2**20)
    record_file("processor/tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json has 314572800 bytes, and 268435456 are allowed"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["prompt.json", "image_processor.json"])
def test_settings_of_any_size_are_not_read(bundle, record_file, name):
    with (bundle / "processor" / name).open("ab") as file:
        file.write(b" " * 2**23)
    record_file(f"processor/{name}")
    with pytest.raises(BundleError, match=rf"cannot read .*{name}: it has .* bytes"):
        Pipeline.load(bundle)


def npy(array: np.ndarray, **changes: object) -> bytes:
    """A .npy file whose header says other things than its array."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | changes
    text = repr(header).encode()
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + array.tobytes()


ARRAY = np.zeros((512, 64), np.float32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy(ARRAY)[:-1],
        npy(ARRAY, shape=(512, 65)),
        npy(ARRAY, shape=(10**12, 10**12)),
        npy(ARRAY, shape=(-1, 64)),
        npy(ARRAY, shape="many"),
        npy(ARRAY, descr="|O"),
        npy(ARRAY, descr="<i4"),
        npy(ARRAY, descr="<c8"),
        npy(ARRAY, descr=[("x", "<f4")]),
        npy(ARRAY, descr="<U1"),
        npy(ARRAY, colour="red"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x01\x00\xff\x00" + b"(" * 255,
        b"\x93NUMPY\x03\x00\xff\x00\x00\x00" + b"\xff" * 255,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    ],
)
def test_embeddings_that_are_not_a_table_of_floats_are_refused(bundle, record_file, content):
    (bundle / "language/embeddings.npy").write_bytes(content)
    record_file("language/embeddings.npy")
    with pytest.raises(BundleError, match="cannot read the embeddings"):
        Pipeline.load(bundle)


def test_tables_in_any_layout_of_floats_give_the_same_answer(bundle, record_file, photo):
    expected = Pipeline.load(bundle).generate("what", [photo], SamplingParams(8)).token_ids
    table = np.load(bundle / "language/embeddings.npy")
    for other in (np.asfortranarray(table), table.astype(">f4"), table.astype(np.float64)):
        np.save(bundle / "language/embeddings.npy", other)
        record_file("language/embeddings.npy")
        assert Pipeline.load(bundle).generate("what", [photo], SamplingParams(8)).token_ids == expected


def refer_to(file: Path, location: str) -> None:
    """Let a graph read its weights elsewhere."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["vision/model.onnx", "language/decoder.onnx"])
@pytest.mark.parametrize("location", ["../../outside", "{outside}", "link", "folder/outside"])
def test_weights_outside_of_the_bundle_are_refused_by_the_engine(bundle, record_file, name, location):
    """onnxruntime itself refuses them. Should a version of it no longer do so, this tells."""
    outside = bundle.parent / "outside"
    outside.write_bytes((bundle / f"{name}.data").read_bytes())
    folder = (bundle / name).parent
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(bundle.parent, target_is_directory=True)
    refer_to(bundle / name, location.format(outside=outside))
    record_file(name)
    with pytest.raises(EngineError, match="External data path"):
        Pipeline.load(bundle)


@pytest.mark.parametrize("name", ["vision/model.onnx", "language/decoder.onnx"])
def test_weights_from_a_pipe_are_refused_and_waited_for_by_nobody(bundle, record_file, name):
    os.mkfifo((bundle / name).parent / "pipe")
    refer_to(bundle / name, "pipe")
    record_file(name)
    with pytest.raises(EngineError):
        Pipeline.load(bundle)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("language/decoder.onnx", {"language": {"num_layers": 10_000}}),
        ("language/decoder.onnx", {"language": {"num_layers": 1}}),
        ("language/decoder.onnx", {"language": {"num_kv_heads": 2**20}}),
        ("language/decoder.onnx", {"decoder": {"dtype": "float16"}}),
        ("vision/model.onnx", {"vision": {"image_size": 8000}}),
        ("vision/model.onnx", {"vision": {"num_prefix_tokens": 1}}),
    ],
)
def test_a_graph_that_its_manifest_does_not_describe_is_refused_when_it_is_opened(bundle, edit_manifest, name, changes):
    def change(manifest):
        for part, values in changes.items():
            (manifest["language"]["decoder"] if part == "decoder" else manifest[part]).update(values)

    edit_manifest(change)
    with pytest.raises(BundleError, match=rf"puts of .*{name} are not those that the manifest says: .*; export it"):
        Pipeline.load(bundle)


def test_a_head_size_that_the_graph_leaves_open_costs_the_request_and_nothing_else(bundle, edit_manifest, photo, capfd):
    edit_manifest(lambda manifest: manifest["language"].update(head_size=4096))
    pipeline = Pipeline.load(bundle)
    with pytest.raises(HivtpError, match="decoder"):
        pipeline.generate("what", [photo])
    # What onnxruntime has to say is in the error.
    assert capfd.readouterr() == ("", "")


def test_a_damaged_graph_prints_nothing(bundle, record_file, capfd):
    file = bundle / "vision/model.onnx"
    for byte in (b"\xff", b"\0", b"\x80"):
        content = file.read_bytes()
        place = content.index(b"MatMul")
        file.write_bytes(content[:place] + byte + content[place + 1 :])
        record_file("vision/model.onnx")
        with pytest.raises(EngineError):
            Pipeline.load(bundle)
        assert capfd.readouterr() == ("", "")
        file.write_bytes(content)


def change_json(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / name).read_text())
    change(content)
    (bundle / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 50_000, "width": 50_000}},
        {"size": {"height": 12_000, "width": 12_000}},
        {"size": {"shortest_edge": 10**9}},
        {"size": {"shortest_edge": 10**400}},
        {"rescale_factor": 10**400},
        {"image_mean": [0, 0, 10**400]},
        {"image_std": [1, 1, "1"]},
        {"resample": [3]},
    ],
)
def test_a_preprocessing_that_nobody_could_run_is_refused_when_the_bundle_is_opened(bundle, record_file, changes):
    name = "processor/image_processor.json"
    change_json(bundle, name, lambda settings: settings.update(changes))
    record_file(name)
    with pytest.raises(BundleError, match=r"the image preprocessing of .* is damaged or not supported"):
        Pipeline.load(bundle)


def add_token(token_id: int) -> Callable[[dict[str, Any]], object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return lambda tokenizer: tokenizer["added_tokens"].append({"id": token_id, "content": "zz", **flags})


def test_tokens_that_the_model_does_not_have_cost_the_prompts_that_use_them(bundle, record_file):
    change_json(bundle, "processor/tokenizer.json", add_token(512))
    record_file("processor/tokenizer.json")
    pipeline = Pipeline.load(bundle)
    assert pipeline.generate("hello", sampling=SamplingParams(2)).token_ids
    with pytest.raises(BundleError, match="makes token 512 of this prompt, and the model has tokens 0 to 511"):
        pipeline.generate("zz", sampling=SamplingParams(2))


@pytest.mark.parametrize(
    "changes",
    [
        # The library raises.
        {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}},
        # The library panics, which is not an Exception.
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_tokenizer_that_fails_on_a_text_costs_that_prompt(bundle, record_file, changes):
    change_json(bundle, "processor/tokenizer.json", lambda tokenizer: tokenizer.update(changes))
    record_file("processor/tokenizer.json")
    pipeline = Pipeline.load(bundle)
    with pytest.raises(PromptError, match="the tokenizer cannot encode this text"):
        pipeline.generate("hello")
    # Literal special tokens are encoded in a way of their own.
    with pytest.raises(PromptError, match="the tokenizer cannot encode this text"):
        pipeline.generate("hello </s>")


def test_a_prompt_that_no_context_could_hold_is_refused_before_it_is_tokenised(bundle, monkeypatch):
    pipeline = Pipeline.load(bundle)
    with pytest.raises(PromptError, match=r"the prompt takes .* tokens"):
        pipeline.generate("x" * 60_000)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_arguments: pytest.fail("it was tokenised"))
    with pytest.raises(PromptError, match="has 1000017 characters, and no more than 65536 can fit the context of 512"):
        pipeline.generate("x" * 10**6)


@pytest.mark.parametrize("changes", [{"image_token": "x" * 300}, {"tokens": {"bos_token": "x" * 300}}])
def test_special_tokens_of_any_length_are_refused(bundle, record_file, changes):
    change_json(bundle, "processor/prompt.json", lambda settings: settings.update(changes))
    record_file("processor/prompt.json")
    with pytest.raises(BundleError, match="a token is empty, has more than 256 characters, or is not text"):
        Pipeline.load(bundle)


def test_pixels_of_another_size_are_refused_when_the_bundle_is_opened(bundle, record_file):
    size = {"crop_size": {"height": 9_000, "width": 9_000}}
    change_json(bundle, "processor/image_processor.json", lambda settings: settings.update(size))
    record_file("processor/image_processor.json")
    with pytest.raises(BundleError, match="9000 x 9000 pixels, and the vision graph takes 64 x 64"):
        Pipeline.load(bundle)
