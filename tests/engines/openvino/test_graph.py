"""Graphs of strangers before OpenVINO sees them: it would map any file beside them, and memory by its address."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import onnx
import pytest

from hivtp.engines import EngineSettings, open_vision_engine
from hivtp.engines.bundle import Bundle
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("openvino", reason="openvino is not installed")

SETTINGS = EngineSettings(num_threads=1, precision="float32")


def name_weights(file: Path, change: Callable[[str], str]) -> None:
    """Let a graph name other files for its weights."""
    model = onnx.load(file, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert entries
    for entry in entries:
        entry.value = change(entry.value)
    file.write_bytes(model.SerializeToString())


def opened(folder: Path) -> object:
    return open_vision_engine(Bundle.open(folder), "openvino", SETTINGS)


@pytest.fixture
def alter(bundle: Path, record_file: Callable[[str], None]) -> Callable[[Callable[[str], str]], Path]:
    def change(how: Callable[[str], str]) -> Path:
        name_weights(bundle / "vision" / "model.onnx", how)
        record_file("vision/model.onnx")
        return bundle

    return change


@pytest.mark.parametrize(
    "location",
    ["../language/decoder.onnx.data", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "unlisted.data", "..", ".", "", "a/b.data"],
)
def test_weights_that_the_manifest_does_not_list_are_refused(alter, location):
    folder = alter(lambda _: location)
    (folder / "vision" / "unlisted.data").write_bytes(b"0" * 2**20)
    with pytest.raises(BundleError, match=r"model\.onnx reads weights from .*, which the manifest does not list"):
        opened(folder)


def test_weights_in_the_body_of_a_node_are_looked_at_too(bundle, record_file):
    file = bundle / "vision" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    constant = onnx.helper.make_node("Constant", [], ["unused"], value=onnx.TensorProto(dims=[4], data_type=1))
    entry = constant.attribute[0].t.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    constant.attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
    inner = onnx.helper.make_graph([constant], "body", [], [onnx.helper.make_tensor_value_info("unused", 1, [4])])
    model.graph.node.append(
        onnx.helper.make_node("If", [model.graph.input[0].name], ["either"], then_branch=inner, else_branch=inner)
    )
    file.write_bytes(model.SerializeToString())
    record_file("vision/model.onnx")
    with pytest.raises(BundleError, match="reads weights from '/etc/passwd'"):
        opened(bundle)


def test_a_graph_that_is_none_is_refused(bundle, record_file):
    (bundle / "vision" / "model.onnx").write_bytes(b"\x08\x0anot a graph")
    record_file("vision/model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is not a readable ONNX graph"):
        opened(bundle)


def test_a_graph_that_its_manifest_does_not_describe_is_refused(bundle, edit_manifest):
    edit_manifest(lambda manifest: manifest["vision"].update(image_size=80))
    with pytest.raises(BundleError, match=r"inputs of .* are not those that the manifest says: pixel_values"):
        opened(bundle)


@pytest.mark.parametrize("can_link", [True, False])
def test_a_snapshot_of_the_hub_whose_weights_are_links_is_read(pruned_bundle, tmp_path, monkeypatch, can_link):
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / "0123"
    for number, file in enumerate(sorted(file for file in pruned_bundle.rglob("*") if file.is_file())):
        blob = root / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        place = snapshot / file.relative_to(pruned_bundle)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blob)
    if not can_link:

        def refuse(*_: object) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", refuse)
    found = list(tmp_path.iterdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert opened(snapshot).output_names[0] == "image_embeds"
    assert list(tmp_path.iterdir()) == found, "nothing is left behind"
