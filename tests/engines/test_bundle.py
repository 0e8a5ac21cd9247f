from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hivtp import Pipeline
from hivtp.engines.bundle import SCHEMA_VERSION, Bundle, Manifest
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def bundle(pruned_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pruned_bundle, tmp_path / "bundle")


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def every_file(bundle: Path) -> list[str]:
    return list(json.loads((bundle / "manifest.json").read_text())["files"])


def test_a_manifest_survives_json(pruned_bundle, unpruned_bundle):
    for folder in (pruned_bundle, unpruned_bundle):
        manifest = Bundle.open(folder).manifest
        assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_bundle_says_what_it_holds(pruned_bundle, unpruned_bundle):
    bundle = Bundle.open(pruned_bundle, check_hashes=True)
    assert bundle.folder == pruned_bundle
    assert bundle.vision_file.is_file()
    assert (bundle.processor_folder / "tokenizer.json").is_file()
    vision = bundle.manifest.vision
    assert (vision.grid, vision.num_image_tokens, vision.capacity) == ((8, 8), 64, 32)
    assert bundle.manifest.pruning.num_layers == 1
    assert Bundle.open(unpruned_bundle).manifest.pruning is None


def test_the_manifest_records_every_other_file(pruned_bundle):
    found = {file.relative_to(pruned_bundle).as_posix() for file in pruned_bundle.rglob("*") if file.is_file()}
    assert set(every_file(pruned_bundle)) == found - {"manifest.json"}


def test_a_bundle_opens_and_answers_where_it_was_moved_to(bundle, tmp_path, photo):
    before = Pipeline.load(bundle).generate("what", [photo], max_new_tokens=8)
    bundle.rename(tmp_path / "elsewhere")
    moved = Pipeline.load(str(tmp_path / "elsewhere"), check_hashes=True)
    assert moved.generate("what", [photo], max_new_tokens=8).token_ids == before.token_ids


def test_any_missing_file_is_named(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=rf"lacks {name}; copy or export it again"):
            Bundle.open(bundle)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle)


def test_any_truncated_or_longer_file_is_named(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        for damaged in (content[:-1], content + b"\0", b""):
            (bundle / name).write_bytes(damaged)
            with pytest.raises(BundleError, match=rf"{name} .* has {len(damaged)} bytes instead of {len(content)}"):
                Bundle.open(bundle)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle)


def test_any_altered_file_of_the_same_size_is_named_where_hashes_are_checked(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        middle = len(content) // 2
        (bundle / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        Bundle.open(bundle)
        with pytest.raises(BundleError, match=rf"{name} .* was altered: its sha256 differs"):
            Bundle.open(bundle, check_hashes=True)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle, check_hashes=True)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (SCHEMA_VERSION + 1, "upgrade hivtp"),
        (SCHEMA_VERSION + 41, "upgrade hivtp"),
        (SCHEMA_VERSION - 1, "export it again"),
        ("next", "export it again"),
        (None, "export it again"),
    ],
)
def test_another_schema_is_refused_before_anything_else_is_read(bundle, version, advice):
    edit_manifest(bundle, lambda manifest: (manifest.clear(), manifest.update(schema_version=version)))
    with pytest.raises(
        BundleError, match=rf"has schema version {version!r}, this hivtp reads {SCHEMA_VERSION}; {advice}"
    ):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"schema_version"', b"{}", b"\xff\xfe\x00"])
def test_a_manifest_that_is_none_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="cannot open the bundle"):
        Bundle.open(bundle)


def test_a_manifest_cut_anywhere_is_refused(bundle):
    file = bundle / "manifest.json"
    text = file.read_text().rstrip()
    for length in range(0, len(text), 97):
        file.write_text(text[:length])
        with pytest.raises(BundleError, match="cannot open the bundle"):
            Bundle.open(bundle)


@pytest.mark.parametrize(
    "part", [(), ("vision",), ("language",), ("language", "decoder"), ("pruning",), ("files", "vision/model.onnx")]
)
def test_missing_and_unknown_keys_are_refused_in_every_part(bundle, part):
    text = (bundle / "manifest.json").read_text()

    def section(manifest: dict[str, Any]) -> dict[str, Any]:
        for key in part:
            manifest = manifest[key]
        return manifest

    for key in section(json.loads(text)):
        if key != "schema_version":
            edit_manifest(bundle, lambda manifest, key=key: section(manifest).pop(key))
            with pytest.raises(BundleError, match=rf"its manifest is damaged.*{key}.*export it again"):
                Bundle.open(bundle)
            (bundle / "manifest.json").write_text(text)
    edit_manifest(bundle, lambda manifest: section(manifest).update(colour="red"))
    with pytest.raises(BundleError, match=r"its manifest is damaged.*colour.*export it again"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision", "grid", 8),
        ("vision", "file", None),
        ("vision", "capacity", "32"),
        ("language", "vocab_size", 512.5),
        ("language", "decoder", {}),
        ("language", "decoder", "fp32"),
        ("language", "eos_token_ids", 2),
        ("pruning", "window", "two"),
        (None, "vision", None),
        (None, "vision", []),
        (None, "language", {}),
        (None, "language", ""),
        (None, "pruning", 0),
        (None, "files", []),
        (None, "files", {"vision/model.onnx": 12}),
        (None, "family", 1),
        (None, "verification", "yes"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(bundle, part, key, value):
    edit_manifest(bundle, lambda manifest: (manifest[part] if part else manifest).update({key: value}))
    with pytest.raises(BundleError, match=r"its manifest is damaged.*export it again"):
        Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["absent", "file", "empty folder", "manifest is a folder"])
def test_what_is_no_bundle_is_refused(tmp_path, kind):
    folder = tmp_path / "bundle"
    if kind == "file":
        folder.write_text("bundle")
    elif kind != "absent":
        folder.mkdir()
        if kind.startswith("manifest"):
            (folder / "manifest.json").mkdir()
    expected = "is not a folder" if kind in ("absent", "file") else r"has no manifest\.json"
    with pytest.raises(BundleError, match=rf"{expected}; give the folder that hivtp-export wrote"):
        Bundle.open(folder)


def test_a_manifest_that_cannot_be_read_is_refused(bundle, monkeypatch):
    def refuse(*_args: object, **_options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BundleError, match=r"cannot open the bundle.*Permission denied"):
        Bundle.open(bundle)


def test_an_encoder_bundle_cannot_answer(bundle):
    edit_manifest(bundle, lambda manifest: (manifest.update(language=None), manifest["vision"].update(graph="encoder")))
    with pytest.raises(BundleError, match=r"holds the encoder graph alone and cannot answer; export it with --graph"):
        Pipeline.load(bundle)


def damage(file: Path, content: bytes) -> None:
    """Give a file other content of the same size, which only its hash tells."""
    size = file.stat().st_size
    assert len(content) <= size
    file.write_bytes(content.ljust(size, b" "))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor/tokenizer.json", b"{}"),
        ("processor/tokenizer.json", b"\xff"),
        ("processor/prompt.json", b"{"),
        ("processor/prompt.json", b"[]"),
        ("processor/prompt.json", b'{"chat": null}'),
        ("processor/image_processor.json", b"null"),
        ("processor/image_processor.json", b'{"image_processor_type": "Other"}'),
        ("processor/image_processor.json", b"\xff"),
        ("language/embeddings.npy", b"not numpy"),
        ("language/embeddings.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'  }"),
        ("language/embeddings.npy", b"PK\x03\x04"),
    ],
)
def test_an_altered_file_that_makes_no_sense_is_a_bundle_error_even_without_hashes(bundle, name, content):
    damage(bundle / name, content)
    with pytest.raises(BundleError):
        Pipeline.load(bundle)


def test_embeddings_of_another_model_are_refused(bundle):
    edit_manifest(bundle, lambda manifest: manifest["language"].update(vocab_size=256))
    with pytest.raises(
        BundleError, match=r"float32 of shape \[512, 64\], the manifest says floats of shape \[256, 64\]"
    ):
        Pipeline.load(bundle)
