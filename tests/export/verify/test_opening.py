"""Before a bundle gets its place it is opened and asked, and fed as transformers would feed the model."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines.bundle import sha256_of
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.opening import open_and_ask
from hivtp.export.verify.samples import sample_files
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Exported:
    """A bundle and what it was exported from."""

    def __init__(self, checkpoint: Path, bundle: Path) -> None:
        self.checkpoint = Checkpoint.open(checkpoint)
        self.processor = Processor.open(self.checkpoint)
        self.folder = bundle

    def copy(self, folder: Path) -> Path:
        return shutil.copytree(self.folder, folder)

    def open(self, folder: Path) -> None:
        open_and_ask(folder, self.checkpoint, self.processor)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, pruned_bundle: Path) -> Exported:
    return Exported(tiny_checkpoint, pruned_bundle)


@pytest.fixture(scope="module")
def exported_next(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("next")
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", text={"max_position_embeddings": 1024})
    export_bundle(checkpoint, folder / "bundle", ExportSettings(language_precision="none"), is_quiet=True)
    return Exported(checkpoint, folder / "bundle")


def rewrite(folder: Path, name: str, function: Callable[[bytes], bytes]) -> None:
    """Change a file of a bundle, and what the manifest says of it."""
    file = folder / name
    content = function(file.read_bytes())
    file.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"num_bytes": len(content), "sha256": sha256_of(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def in_json(function: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(function(json.loads(content))).encode()


def reversed_table(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.load(io.BytesIO(content))[::-1])
    return buffer.getvalue()


def test_right_bundles_pass_in_silence(exported: Exported, exported_next: Exported, tmp_path: Path) -> None:
    before = sorted(exported.folder.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported.open(exported.folder)
        exported_next.open(exported_next.folder)
    assert sorted(exported.folder.rglob("*")) == before
    settings = ExportSettings(graph="encoder")
    encoder = export_bundle(exported.checkpoint.folder, tmp_path / "encoder", settings, is_quiet=True)
    open_and_ask(encoder.folder, exported.checkpoint, None)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "processor/prompt.json",
            in_json(lambda prompt: prompt | {"chat_template": prompt["chat_template"].replace("ASSISTANT", "ANSWER")}),
            r"the bundle makes \[.*\] of 'What is in the image\?', and transformers makes \[.*\]",
        ),
        (
            "processor/prompt.json",
            in_json(lambda prompt: prompt | {"chat_template": "{{ raise_exception('no') }}"}),
            "the bundle cannot be used: ",
        ),
        (
            "processor/image_processor.json",
            in_json(lambda settings: settings | {"image_mean": [0.5, 0.45, 0.4]}),
            "the bundle prepares a photograph otherwise than transformers: a pixel differs by 0",
        ),
        (
            "processor/image_processor.json",
            in_json(lambda settings: settings | {"resample": 2}),
            "the bundle prepares a photograph otherwise than transformers",
        ),
        (
            "processor/image_processor.json",
            in_json(lambda settings: settings | {"image_processor_type": "Other"}),
            "the bundle cannot be used: the image preprocessing of",
        ),
        ("processor/tokenizer.json", lambda content: content[:-100], "the bundle cannot be used: "),
        ("language/embeddings.npy", lambda content: reversed_table(content), "the bundle's token embeddings differ"),
        ("vision/model.onnx", lambda content: content[:-100], "the bundle cannot be used: "),
        ("language/decoder.onnx", lambda content: content[:-100], "the bundle cannot be used: "),
    ],
)
def test_a_bundle_that_is_fed_otherwise_or_cannot_be_opened_is_refused(
    exported: Exported, tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = exported.copy(tmp_path / "bundle")
    rewrite(folder, name, change)
    with pytest.raises(VerificationError, match=message) as caught:
        exported.open(folder)
    assert "nothing was written" in str(caught.value)


def test_logits_that_are_not_numbers_are_refused(exported: Exported, tmp_path: Path) -> None:
    folder = exported.copy(tmp_path / "bundle")
    model = onnx.load(folder / "language" / "decoder.onnx", load_external_data=False)
    [weight] = [item for item in model.graph.initializer if item.name.endswith("layers.0.input_layernorm.weight")]
    nan = numpy_helper.from_array(np.full(tuple(weight.dims), np.nan, np.float32), weight.name)
    weight.CopyFrom(nan)
    rewrite(folder, "language/decoder.onnx", lambda _content: model.SerializeToString())
    with pytest.raises(VerificationError, match="the bundle cannot be used: the largest logit is nan"):
        exported.open(folder)


def test_tiles_are_compared_too(exported_next: Exported, tmp_path: Path) -> None:
    folder = exported_next.copy(tmp_path / "bundle")
    # Fewer grids to choose from, so that images are cut into other tiles.
    rewrite(
        folder,
        "processor/image_processor.json",
        in_json(lambda settings: settings | {"image_grid_pinpoints": settings["image_grid_pinpoints"][:1]}),
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tiling"]["pinpoints"] = manifest["tiling"]["pinpoints"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"otherwise than transformers: pixels of shape \[3, .*expected \[5, "):
        exported_next.open(folder)


def test_an_encoder_graph_of_another_size_is_refused(exported: Exported, tmp_path: Path) -> None:
    settings = ExportSettings(graph="encoder")
    bundle = export_bundle(exported.checkpoint.folder, tmp_path / "encoder", settings, is_quiet=True)
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["vision"]["hidden_size"] += 1
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        VerificationError, match=r"features of shape \[1, 64, 48\], expected finite ones of \[1, 64, 49\]"
    ):
        open_and_ask(bundle.folder, exported.checkpoint, None)


def test_a_template_that_takes_text_only_is_compared_as_well(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", text={"initializer_range": 0.2})
    template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    bundle = export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)
    exported = Exported(folder, bundle.folder)
    copy = exported.copy(tmp_path / "copy")
    rewrite(
        copy,
        "processor/prompt.json",
        in_json(lambda prompt: prompt | {"chat_template": prompt["chat_template"].replace("ASSISTANT", "ANSWER")}),
    )
    with pytest.raises(VerificationError, match="and transformers makes"):
        exported.open(copy)


def test_the_sample_files_are_what_their_names_say() -> None:
    photograph, transparent = (Image.open(io.BytesIO(content)) for content in sample_files().values())
    assert (photograph.format, photograph.mode, photograph.size) == ("JPEG", "RGB", (457, 331))
    assert (transparent.format, transparent.mode, transparent.size) == ("PNG", "RGBA", (203, 117))
    assert transparent.getexif()[274] == 6
    assert len(np.unique(np.asarray(transparent)[:, :, 3])) > 100
    assert photograph.resize((8, 8)).convert("L").getextrema()[1] > 150
