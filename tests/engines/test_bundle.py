from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hivtp import Pipeline, SamplingParams
from hivtp.engines import bundle as bundle_module
from hivtp.engines.bundle import Bundle
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path


def every_file(bundle: Path) -> list[str]:
    return list(json.loads((bundle / "manifest.json").read_text())["files"])


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
    sampling = SamplingParams(max_new_tokens=8)
    before = Pipeline.load(bundle).generate("what", [photo], sampling)
    bundle.rename(tmp_path / "elsewhere")
    moved = Pipeline.load(str(tmp_path / "elsewhere"), check_hashes=True)
    assert moved.generate("what", [photo], sampling).token_ids == before.token_ids


def test_any_missing_file_is_named(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=rf"{name} is missing; copy or export the bundle again"):
            Bundle.open(bundle)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle)


def test_any_truncated_or_longer_file_is_named(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        for damaged in (content[:-1], content + b"\0", b""):
            (bundle / name).write_bytes(damaged)
            with pytest.raises(BundleError, match=rf"{name} has {len(damaged)} bytes instead of {len(content)}"):
                Bundle.open(bundle)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle)


def test_any_altered_file_of_the_same_size_is_named_where_hashes_are_checked(bundle):
    for name in every_file(bundle):
        content = (bundle / name).read_bytes()
        middle = len(content) // 2
        (bundle / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        Bundle.open(bundle)
        with pytest.raises(BundleError, match=rf"{name} was altered: its sha256 differs"):
            Bundle.open(bundle, check_hashes=True)
        (bundle / name).write_bytes(content)
    Bundle.open(bundle, check_hashes=True)


@pytest.mark.parametrize("name", ["vision/extra.data", "language/extra", "processor/chat.json", "vision/deep/er/extra"])
def test_a_file_that_is_not_listed_is_named_where_hashes_are_checked(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"weights")
    Bundle.open(bundle)
    with pytest.raises(BundleError, match=rf"it holds {name}, which its manifest does not list; delete it"):
        Bundle.open(bundle, check_hashes=True)


def test_what_lies_beside_the_manifest_or_is_a_plan_need_not_be_listed(bundle):
    (bundle / "README.md").write_text("what a hub adds")
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "state").write_text("")
    (bundle / "vision" / "plans").mkdir()
    (bundle / "vision" / "plans" / "tensorrt.plan").write_text("a plan has a hash of its own")
    Bundle.open(bundle, check_hashes=True)


@pytest.mark.parametrize("kind", ["absent", "file", "empty folder"])
def test_what_is_not_a_bundle_is_refused(tmp_path, kind):
    folder = tmp_path / "bundle"
    if kind == "file":
        folder.write_text("bundle")
    elif kind == "empty folder":
        folder.mkdir()
    expected = r"has no manifest\.json" if kind == "empty folder" else "is not a folder"
    with pytest.raises(BundleError, match=rf"{expected}; give the folder that hivtp export wrote"):
        Bundle.open(folder)


@pytest.mark.parametrize("folder", [None, 3, b"bundle", ["bundle"]])
def test_what_is_not_a_path_is_refused(folder):
    with pytest.raises(BundleError, match="a bundle is a folder's path, not a"):
        Bundle.open(folder)


@pytest.mark.parametrize("folder", ["a\0b", "x" * 5000])
def test_a_path_that_cannot_be_is_refused(folder):
    with pytest.raises(BundleError, match="cannot open the bundle"):
        Bundle.open(folder)


def test_a_manifest_that_cannot_be_read_is_refused(bundle, monkeypatch):
    def refuse(*_args: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bundle_module, "read_regular", refuse)
    with pytest.raises(BundleError, match=r"cannot open the bundle.*manifest\.json cannot be read: Permission denied"):
        Bundle.open(bundle)


def test_an_encoder_bundle_cannot_answer(make_bundle):
    with pytest.raises(BundleError, match=r"holds the encoder graph alone and cannot answer; export it with --graph"):
        Pipeline.load(make_bundle(graph="encoder"))


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
        ("processor/prompt.json", b"[" * 300),
        ("processor/image_processor.json", b"null"),
        ("processor/image_processor.json", b'{"image_processor_type": "Other"}'),
        ("processor/image_processor.json", b"\xff"),
        ("processor/image_processor.json", b"[" * 300),
        ("language/embeddings.npy", b"not numpy"),
        ("language/embeddings.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'  }"),
        ("language/embeddings.npy", b"PK\x03\x04"),
    ],
)
def test_an_altered_file_that_makes_no_sense_is_a_bundle_error_even_without_hashes(bundle, name, content):
    damage(bundle / name, content)
    with pytest.raises(BundleError):
        Pipeline.load(bundle)


def test_embeddings_of_another_model_are_refused(bundle, edit_manifest):
    def halve(manifest):
        manifest["language"].update(vocab_size=256, image_token_id=255)

    edit_manifest(halve)
    with pytest.raises(
        BundleError, match=r"float32 of shape \[512, 64\], the manifest says floats of shape \[256, 64\]"
    ):
        Pipeline.load(bundle)
