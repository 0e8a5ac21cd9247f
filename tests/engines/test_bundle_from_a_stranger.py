"""A bundle is data: nothing outside its folder is read, nothing blocks, and each refusal is a BundleError."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
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

# Files that a pipeline opens by name, and where the manifest names them.
NAMED = {
    "vision/model.onnx": ("vision", "file"),
    "language/decoder.onnx": ("language", "decoder", "file"),
    "language/embeddings.npy": ("language", "decoder", "embeddings"),
}


def name_otherwise(bundle: Path, old: str, new: str) -> None:
    """Let the manifest say that a file bears another name."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    *parts, last = NAMED[old]
    section = manifest
    for part in parts:
        section = section[part]
    section[last] = new
    manifest["files"][new] = manifest["files"].pop(old)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("old", NAMED)
@pytest.mark.parametrize(
    "new",
    [
        "../outside",
        "vision/../../outside",
        "..",
        ".",
        "",
        "./vision/model.onnx",
        "vision//model.onnx",
        "vision/",
        "/etc/passwd",
        "//etc/passwd",
        "C:/windows",
        "C:outside",
        "..\\outside",
        "vision\\model.onnx",
        "vision/model.onnx\0",
        "vision/\x1b[2Jmodel.onnx",
        "vision/model\n.onnx",
        "vision/\u202emodel.onnx",
        "vision/" + "x" * 300,
        "~/model.onnx",
        "vision/%2e%2e",
    ],
)
def test_a_path_that_is_not_plainly_inside_is_refused(bundle, old, new):
    (bundle.parent / "outside").write_bytes((bundle / old).read_bytes())
    name_otherwise(bundle, old, new)
    with pytest.raises(BundleError, match=r"is not a relative path inside the bundle|is missing"):
        Bundle.open(bundle)


def test_a_path_with_half_a_surrogate_pair_is_refused(bundle):
    name_otherwise(bundle, "vision/model.onnx", "vision/\ud800")
    with pytest.raises(BundleError, match="surrogates not allowed"):
        Bundle.open(bundle)


def test_a_path_of_many_folders_is_refused(bundle):
    name_otherwise(bundle, "vision/model.onnx", "/".join(["folder"] * 1000))
    with pytest.raises(BundleError, match="cannot open the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_the_manifest_uses_and_does_not_list_is_refused(bundle, edit_manifest, name):
    edit_manifest(lambda manifest: manifest["files"].pop(name))
    for check_hashes in (False, True):
        with pytest.raises(BundleError, match=f"uses '{name}', which is not among its files"):
            Bundle.open(bundle, check_hashes=check_hashes)


def test_an_empty_list_of_files_is_refused(bundle, edit_manifest):
    edit_manifest(lambda manifest: manifest["files"].clear())
    with pytest.raises(BundleError, match="which is not among its files"):
        Bundle.open(bundle, check_hashes=True)


def every_file(bundle: Path) -> list[str]:
    return ["manifest.json", *json.loads((bundle / "manifest.json").read_text())["files"]]


def test_a_file_that_is_a_link_out_of_the_bundle_is_refused(bundle):
    outside = bundle.parent / "outside"
    outside.mkdir()
    for name in every_file(bundle):
        moved = (bundle / name).rename(outside / "file")
        (bundle / name).symlink_to(moved)
        with pytest.raises(BundleError, match=f"{name} is a link that leads out of the bundle; do not use it"):
            Bundle.open(bundle)
        (bundle / name).unlink()
        moved.rename(bundle / name)
    Bundle.open(bundle)


@pytest.mark.parametrize("folder", ["language", "vision", "processor"])
def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(bundle, folder):
    moved = (bundle / folder).rename(bundle.parent / "moved")
    (bundle / folder).symlink_to(moved, target_is_directory=True)
    with pytest.raises(BundleError, match=rf"{folder}/.* is a link that leads out of the bundle"):
        Bundle.open(bundle)


def test_a_folder_of_plans_that_is_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    (bundle / "vision/plans").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(BundleError, match="vision/plans is a link that leads out of the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize("target", ["decoder.onnx", "nothing", "/dev/zero", "/proc/self/environ", ".."])
def test_a_link_that_leads_nowhere_or_in_a_circle_is_refused(bundle, target):
    (bundle / "language/decoder.onnx").unlink()
    (bundle / "language/decoder.onnx").symlink_to(target)
    with pytest.raises(BundleError, match=r"language/decoder\.onnx (is missing|is a link|is not a regular)"):
        Bundle.open(bundle)


def test_links_within_a_bundle_and_hard_links_are_followed(bundle, tmp_path):
    (bundle / "language").rename(bundle / "elsewhere")
    (bundle / "language").symlink_to("elsewhere", target_is_directory=True)
    os.link(bundle / "vision/model.onnx", tmp_path / "other")
    (bundle / "vision/model.onnx").unlink()
    os.link(tmp_path / "other", bundle / "vision/model.onnx")
    assert len(Pipeline.load(bundle, check_hashes=True).generate("what", sampling=SamplingParams(4)).token_ids) > 0


def test_a_linked_folder_below_is_refused_where_hashes_are_checked(bundle):
    (bundle / "vision/deep").symlink_to("../language", target_is_directory=True)
    with pytest.raises(BundleError, match="it holds vision/deep, which its manifest does not list"):
        Bundle.open(bundle, check_hashes=True)


def hub_snapshot(bundle: Path, cache: Path, repository: str = "models--owner--name") -> Path:
    """The same bundle as the cache of the Hugging Face hub lays it out."""
    snapshot, blobs = cache / repository / "snapshots" / ("c0ffee" * 6), cache / repository / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in bundle.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / f"blob-{number}")
        link.symlink_to(os.path.relpath(blobs / f"blob-{number}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_opens_and_answers(pruned_bundle, tmp_path, photo):
    snapshot = hub_snapshot(pruned_bundle, tmp_path)
    expected = Pipeline.load(pruned_bundle).generate("what", [photo], SamplingParams(8))
    assert Pipeline.load(snapshot, check_hashes=True).generate("what", [photo], SamplingParams(8)).token_ids == (
        expected.token_ids
    )


def test_blobs_that_are_not_those_of_a_hub_or_lead_on_are_refused(pruned_bundle, tmp_path):
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(hub_snapshot(pruned_bundle, tmp_path, "my-files"))
    snapshot = hub_snapshot(pruned_bundle, tmp_path)
    (snapshot / "language/decoder.onnx").unlink()
    (snapshot / "language/decoder.onnx").symlink_to(pruned_bundle / "language/decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx is a link that leads out of the bundle"):
        Bundle.open(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs", target_is_directory=True)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(snapshot)


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_folder(file: Path) -> None:
    file.mkdir()


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket is short, so it is bound from within its folder.
        before = Path.cwd()
        os.chdir(file.parent)
        server.bind(file.name)
        os.chdir(before)


@pytest.mark.parametrize("make", [make_pipe, make_folder, make_socket])
def test_what_is_not_a_regular_file_is_refused_and_waited_for_by_nobody(bundle, make):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        make(bundle / name)
        with pytest.raises(BundleError, match=r"is not a regular file|cannot be read|has no manifest"):
            Bundle.open(bundle)
        shutil.rmtree(bundle / name) if make is make_folder else (bundle / name).unlink()
        (bundle / name).write_bytes(content)
    Bundle.open(bundle)


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
    with pytest.raises(BundleError, match="the tokenizer cannot encode this text"):
        pipeline.generate("hello")
    # Literal special tokens are encoded in a way of their own.
    with pytest.raises(BundleError, match="the tokenizer cannot encode this text"):
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
    with pytest.raises(BundleError, match="a token has more than 256 characters"):
        Pipeline.load(bundle)


def test_pixels_of_another_size_are_refused_when_the_bundle_is_opened(bundle, record_file):
    size = {"crop_size": {"height": 9_000, "width": 9_000}}
    change_json(bundle, "processor/image_processor.json", lambda settings: settings.update(size))
    record_file("processor/image_processor.json")
    with pytest.raises(BundleError, match="9000 x 9000 pixels, and the graph takes 64 x 64"):
        Pipeline.load(bundle)
