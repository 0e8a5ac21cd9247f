"""A bundle may be a stranger's: nothing outside its folder is read, and nothing in it blocks."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from hivtp import Pipeline, SamplingParams
from hivtp.engines.bundle import Bundle
from hivtp_ops.errors import BundleError

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
