from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from hivtp.engines.bundle import Bundle
from hivtp.engines.manifest import SCHEMA_VERSION
from hivtp.engines.manifest_reader import read_manifest
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_manifest_survives_json(pruned_bundle, unpruned_bundle):
    for folder in (pruned_bundle, unpruned_bundle):
        manifest = Bundle.open(folder).manifest
        assert read_manifest(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("version", "shown", "advice"),
    [
        (SCHEMA_VERSION + 1, str(SCHEMA_VERSION + 1), "upgrade hivtp"),
        (SCHEMA_VERSION + 41, str(SCHEMA_VERSION + 41), "upgrade hivtp"),
        (SCHEMA_VERSION - 1, str(SCHEMA_VERSION - 1), "export it again"),
        ("next", "'next'", "export it again"),
        (None, "None", "export it again"),
        (True, "True", "export it again"),
        ([[]] * 100, r"\[\[\], ", "export it again"),
    ],
)
def test_another_schema_is_refused_before_anything_else_is_read(bundle, edit_manifest, version, shown, advice):
    edit_manifest(lambda manifest: (manifest.clear(), manifest.update(schema_version=version)))
    with pytest.raises(
        BundleError, match=rf"has schema version {shown}.*, this hivtp reads {SCHEMA_VERSION}; {advice}"
    ) as caught:
        Bundle.open(bundle)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b'"schema_version"', b"{}", b"\xff\xfe\x00", b"[" * 100_000]
)
def test_what_is_not_a_manifest_is_refused(bundle, content):
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


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [101, 400, 900])
@pytest.mark.parametrize("key", ["verification", "files", "schema_version", "pruning", "vision", "language"])
def test_deep_nesting_is_refused_wherever_it_is(bundle, edit_manifest, key, depth):
    edit_manifest(lambda manifest: manifest.update({key: nested(depth)}))
    with pytest.raises(BundleError, match=r"cannot open the bundle.*nested too deeply"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "part",
    [
        (),
        ("vision",),
        ("language",),
        ("language", "decoder"),
        ("language", "sampling"),
        ("pruning",),
        ("source",),
        ("files", "vision/model.onnx"),
    ],
)
def test_missing_and_unknown_keys_are_refused_in_every_part(bundle, edit_manifest, part):
    text = (bundle / "manifest.json").read_text()

    def section(manifest: dict[str, Any]) -> dict[str, Any]:
        for key in part:
            manifest = manifest[key]
        return manifest

    for key in section(json.loads(text)):
        if key != "schema_version":
            edit_manifest(lambda manifest, key=key: section(manifest).pop(key))
            with pytest.raises(BundleError, match=rf"its manifest is damaged.*{key}.*export it again"):
                Bundle.open(bundle)
            (bundle / "manifest.json").write_text(text)
    edit_manifest(lambda manifest: section(manifest).update(colour="red"))
    with pytest.raises(BundleError, match=r"its manifest is damaged.*colour.*export it again"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision", "grid", 8),
        ("vision", "grid", [8]),
        ("vision", "grid", [8, "8"]),
        ("vision", "grid", [8, True]),
        ("vision", "grid", [8, 8.0]),
        ("vision", "file", None),
        ("vision", "capacity", "32"),
        ("vision", "precision", "bf16"),
        ("vision", "precision", ["fp32"]),
        ("vision", "graph", "encoders"),
        ("language", "vocab_size", 512.5),
        ("language", "decoder", {}),
        ("language", "decoder", "fp32"),
        ("language", "eos_token_ids", 2),
        ("decoder", "precision", "\x1b[2Jfp32"),
        ("decoder", "precision", "fp32" * 20),
        ("decoder", "prefill_precision", ""),
        ("decoder", "dtype", "float64"),
        ("language", "eos_token_ids", [2, "2"]),
        ("language", "eos_token_ids", [[2]]),
        ("language", "eos_token_ids", [True]),
        ("language", "sampling", {"temperature": "hot"}),
        ("pruning", "window", "two"),
        ("pruning", "first_layer", None),
        ("source", "name", None),
        (None, "source", "a-checkpoint"),
        (None, "vision", None),
        (None, "vision", []),
        (None, "language", {}),
        (None, "language", ""),
        (None, "language", None),
        (None, "pruning", 0),
        (None, "files", []),
        (None, "files", {}),
        (None, "files", {"vision/model.onnx": 12}),
        (None, "files", {"vision/model.onnx": {"num_bytes": -1, "sha256": ""}}),
        (None, "family", 1),
        (None, "family", "llava_next"),
        (None, "verification", "yes"),
        (None, "versions", {"hivtp": 1}),
    ],
)
def test_values_of_the_wrong_kind_are_refused(bundle, edit_manifest, part, key, value):
    def section(manifest):
        return manifest["language"]["decoder"] if part == "decoder" else manifest[part] if part else manifest

    edit_manifest(lambda manifest: section(manifest).update({key: value}))
    with pytest.raises(BundleError, match=r"its manifest is damaged.*export it again"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision", "num_layers", 10**7),
        ("vision", "num_layers", 2),
        ("vision", "grid", [10**6, 10**6]),
        ("vision", "grid", [0, 8]),
        ("vision", "image_size", 10**6),
        ("vision", "capacity", 65),
        ("vision", "capacity", 31),
        ("vision", "hidden_size", 10**9),
        ("vision", "hidden_size", 128),
        ("vision", "num_prefix_tokens", 7),
        ("language", "num_layers", 10**7),
        ("language", "num_kv_heads", 10**9),
        ("language", "head_size", 10**7),
        ("language", "hidden_size", 10**9),
        ("language", "vocab_size", 10**12),
        ("language", "context_length", 10**18),
        ("language", "context_length", -1),
        ("language", "image_token_id", 512),
        ("language", "eos_token_ids", [2, -1]),
        ("pruning", "regions", 10**9),
        ("pruning", "window", 10**30),
        ("pruning", "keep", 10**9),
        ("pruning", "num_layers", 10**9),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(bundle, edit_manifest, part, key, value):
    edit_manifest(lambda manifest: manifest[part].update({key: value}))
    started = time.perf_counter()
    with pytest.raises(BundleError, match=r"its manifest is damaged.*export it again"):
        Bundle.open(bundle)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", 1e999),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
    ],
)
def test_sampling_defaults_out_of_range_are_refused(bundle, edit_manifest, key, value):
    edit_manifest(lambda manifest: manifest["language"]["sampling"].update({key: value}))
    with pytest.raises(BundleError, match=r"its manifest is damaged.*sampling"):
        Bundle.open(bundle)


@pytest.fixture
def tiling(edit_manifest: Callable[..., None], bundle: Path) -> Callable[..., None]:
    """Makes `bundle` claim to be of LLaVA-NeXT, with these settings of its tiles."""
    (bundle / "vision/newline.npy").write_bytes(b"")

    def claim(**changes: Any) -> None:
        settings = {
            "pinpoints": [[64, 128]],
            "newline": "kept-rows",
            "newline_file": "vision/newline.npy",
            "keep_total": None,
            "min_for_base": 7,
            "max_view_tiles": 9,
        }
        record = {"vision/newline.npy": {"num_bytes": 0, "sha256": ""}}
        edit_manifest(lambda manifest: manifest.update(family="llava_next", tiling=settings | changes))
        edit_manifest(lambda manifest: manifest["files"].update(record))

    return claim


@pytest.mark.parametrize(
    "changes",
    [
        {"pinpoints": []},
        {"pinpoints": [[64, 128]] * 1001},
        {"pinpoints": [[64, 10**30]]},
        {"pinpoints": [[64, 0]]},
        {"pinpoints": [[64, 128, 3]]},
        {"pinpoints": [64, 128]},
        {"keep_total": 0},
        {"keep_total": 6},
        {"min_for_base": -1},
        {"min_for_base": None},
        {"max_view_tiles": 0},
        {"max_view_tiles": "9"},
        {"max_view_tiles": 10**6},
        {"newline": 3},
        {"newline": "\x1b[2J"},
    ],
)
def test_a_tiling_that_cannot_be_is_refused(bundle, tiling, changes):
    tiling()
    assert Bundle.open(bundle).manifest.tiling.pinpoints == ((64, 128),)
    tiling(**changes)
    with pytest.raises(BundleError, match=r"its manifest is damaged.*tiling"):
        Bundle.open(bundle)
