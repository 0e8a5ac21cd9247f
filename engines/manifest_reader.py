"""Reads a manifest. It may come from a stranger: types, sizes and paths are checked before anything uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp.engines.files import parse_json
from hivtp.engines.manifest import SCHEMA_VERSION, Manifest
from hivtp.engines.record import read_record, shown
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hivtp.engines.manifest import LanguageManifest, TilingManifest, VisionManifest
    from hivtp_ops.spec import PruningSpec

# Far beyond any model. They bound what is computed and allocated before a graph has been compared with the manifest.
MAX_LAYERS = 10_000
MAX_GRID_SIDE = 256
MAX_IMAGE_SIZE = 2**13
MAX_WIDTH = 2**20
MAX_HEAD_SIZE = 2**12
MAX_VOCABULARY = 10**7
MAX_CONTEXT = 2**30
MAX_PINPOINTS = 1000
MAX_WORD = 40
# Each with whether it has no tiling.
FAMILIES = {("llava", True), ("llava_next", False), ("llava_onevision", False)}
# Of Linux, for one part of a path.
MAX_NAME_BYTES = 255


def read_manifest(content: bytes | str) -> Manifest:
    """Read a manifest; the schema version is checked before anything else.

    Raises:
        BundleError: it is not JSON or of another schema; or a key is missing, unknown or of the wrong type, a size is
            out of range, or a path leads out of the bundle.
    """
    try:
        raw = parse_json(content)
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"not a manifest of hivtp: {type(error).__name__}: {error}") from error
    if version != SCHEMA_VERSION or isinstance(version, bool):
        is_newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade hivtp" if is_newer else "export it again"
        raise BundleError(f"it has schema version {shown(version)}, this hivtp reads {SCHEMA_VERSION}; {advice}")
    try:
        manifest = read_record(Manifest, raw)
        _check(manifest)
    except ValueError as error:
        raise BundleError(f"its manifest is damaged: {error}; export it again") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse values that no export writes.

    Raises:
        ValueError: the first that was found.
    """
    _check_vision(manifest.vision)
    if manifest.pruning is not None:
        _check_pruning(manifest.pruning, manifest.vision)
    if (manifest.family, manifest.tiling is None) not in FAMILIES:
        tiling = "has no tiling" if manifest.tiling is None else "has a tiling"
        raise ValueError(f"its family is {shown(manifest.family)}, and it {tiling}")
    if manifest.tiling is not None:
        _check_tiling(manifest.tiling)
    for name, word in _words(manifest):
        if not (0 < len(word) <= MAX_WORD and word.isprintable()):
            raise ValueError(f"{name} is {shown(word)}, expected a word")
    if (manifest.language is None) != (manifest.vision.graph == "encoder"):
        holds = "no language model" if manifest.language is None else "a language model"
        raise ValueError(f"it holds the {manifest.vision.graph} graph and {holds}")
    if manifest.language is not None:
        _check_language(manifest.language)
        if manifest.language.hidden_size != manifest.vision.hidden_size:
            raise ValueError(
                f"vision.hidden_size is {manifest.vision.hidden_size}, and language.hidden_size is "
                f"{manifest.language.hidden_size}"
            )
    for name, record in manifest.files.items():
        _check_name(name)
        if record.num_bytes < 0:
            raise ValueError(f"{name} has {record.num_bytes} bytes")
    for name in manifest.used_files():
        if name not in manifest.files:
            raise ValueError(f"it uses {shown(name)}, which is not among its files")


def _words(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Names of precisions and rules, which messages repeat."""
    if manifest.tiling is not None:
        yield "tiling.newline", manifest.tiling.newline
    decoder = None if manifest.language is None else manifest.language.decoder
    if decoder is not None:
        yield "language.decoder.precision", decoder.precision
        if decoder.prefill_precision is not None:
            yield "language.decoder.prefill_precision", decoder.prefill_precision


def _check_vision(vision: VisionManifest) -> None:
    _check_sizes(
        [
            ("vision.num_layers", vision.num_layers, MAX_LAYERS),
            ("vision.grid[0]", vision.grid[0], MAX_GRID_SIDE),
            ("vision.grid[1]", vision.grid[1], MAX_GRID_SIDE),
            ("vision.image_size", vision.image_size, MAX_IMAGE_SIZE),
            ("vision.capacity", vision.capacity, vision.num_patches),
            ("vision.hidden_size", vision.hidden_size, MAX_WIDTH),
        ]
    )
    if vision.num_prefix_tokens not in (0, 1):
        raise ValueError(f"vision.num_prefix_tokens is {vision.num_prefix_tokens}, expected 0 or 1")


def _check_pruning(spec: PruningSpec, vision: VisionManifest) -> None:
    if spec.first_layer is None or spec.num_layers is None:
        raise ValueError("pruning names no layers")
    # Refuses layers that the tower does not have.
    spec.resolve(vision.num_layers)
    if spec.capacity(vision.grid) != vision.capacity:
        raise ValueError(f"vision.capacity is {vision.capacity}, and the rule keeps {spec.capacity(vision.grid)}")


def _check_tiling(tiling: TilingManifest) -> None:
    if not 1 <= len(tiling.pinpoints) <= MAX_PINPOINTS:
        raise ValueError(f"tiling.pinpoints holds {len(tiling.pinpoints)}, expected 1 to {MAX_PINPOINTS}")
    _check_sizes(_pinpoint_sizes(tiling.pinpoints))
    if tiling.max_view_tiles is not None:
        _check_sizes([("tiling.max_view_tiles", tiling.max_view_tiles, MAX_PINPOINTS)])
    if tiling.min_for_base < 0 or (tiling.keep_total is not None and tiling.keep_total < max(1, tiling.min_for_base)):
        raise ValueError(
            f"tiling.keep_total is {tiling.keep_total}, and tiling.min_for_base is {tiling.min_for_base}; "
            "expected a total of at least the base tile's"
        )


def _pinpoint_sizes(pinpoints: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    for index, pinpoint in enumerate(pinpoints):
        for side in pinpoint:
            yield f"tiling.pinpoints[{index}]", side, MAX_WIDTH


def _check_language(language: LanguageManifest) -> None:
    _check_sizes(
        [
            ("language.num_layers", language.num_layers, MAX_LAYERS),
            ("language.num_kv_heads", language.num_kv_heads, MAX_WIDTH),
            ("language.head_size", language.head_size, MAX_HEAD_SIZE),
            ("language.hidden_size", language.hidden_size, MAX_WIDTH),
            ("language.vocab_size", language.vocab_size, MAX_VOCABULARY),
            ("language.context_length", language.context_length, MAX_CONTEXT),
        ]
    )
    for token_id in (language.image_token_id, *language.eos_token_ids):
        if not 0 <= token_id < language.vocab_size:
            raise ValueError(f"token {shown(token_id)} lies outside a vocabulary of {language.vocab_size}")
    sampling = language.sampling
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise ValueError(f"language.sampling is {shown(sampling)}, out of range")
    if sampling.repetition_penalty <= 0:
        raise ValueError(f"language.sampling.repetition_penalty is {sampling.repetition_penalty}, expected more than 0")


def _check_sizes(sizes: Sequence[tuple[str, int, int]] | Iterator[tuple[str, int, int]]) -> None:
    """Refuse a size, given with its name and its largest value, that is out of range.

    Raises:
        ValueError: the first that was found.
    """
    for name, size, largest in sizes:
        if not 1 <= size <= largest:
            raise ValueError(f"{name} is {shown(size)}, expected 1 to {largest}")


def _check_name(name: str) -> None:
    """Refuse a path that is not plainly relative.

    Raises:
        ValueError: it is not.
    """
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in parts)
    # A backslash and a colon separate folders and drives on Windows.
    if not is_plain or not name.isprintable() or any(mark in name for mark in "\\:"):
        raise ValueError(f"{shown(name)} is not a relative path inside the bundle")
