"""The bundle: a folder of graphs and settings, with a manifest that says what each file is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping  # noqa: TC003  the hints are read at run time
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import parse_json, read_json, read_regular
from hivtp.engines.record import read_record
from hivtp_ops.errors import BundleError, SpecError
from hivtp_ops.spec import PruningSpec  # noqa: TC001  the hints are read at run time

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA_VERSION = 5
MANIFEST_NAME = "manifest.json"
PROCESSOR_FOLDER = "processor"
PROCESSOR_FILES = ("tokenizer.json", "image_processor.json", "prompt.json")
# Plans belong to a machine and not to the bundle: each has a sidecar with its own hash, and is trusted by other means.
PLANS_FOLDER = "vision/plans"
MAX_MANIFEST_BYTES = 64 * 2**20
# Of any array that is read whole: a newline's embedding.
MAX_ARRAY_BYTES = 2**20
# Sizes that no model comes near, and beyond which a file has been tampered with.
MAX_SIZE = 10**7


@dataclass(frozen=True)
class VisionManifest:
    """The vision graph.

    Attributes:
        file: the graph, relative to the bundle.
        graph: "vision" (pruned embeddings) or "encoder" (features and attention).
        precision: fp32, fp16, fp8 or int8.
        num_layers: layers of the vision tower, those that do not run included.
        grid: rows and columns of patches in one tile.
        image_size: side of a tile in pixels.
        num_prefix_tokens: tokens in front of the patches (1 where the CLS is a feature).
        capacity: most patches that one tile keeps.
        hidden_size: width of one output token.
    """

    file: str
    graph: str
    precision: str
    num_layers: int
    grid: tuple[int, int]
    image_size: int
    num_prefix_tokens: int
    capacity: int
    hidden_size: int

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one tile before pruning."""
        return self.num_prefix_tokens + self.num_patches


@dataclass(frozen=True)
class TilingManifest:
    """How LLaVA-NeXT lays a picture on tiles and its tokens in a row.

    Attributes:
        pinpoints: (height, width) of every tile grid, in pixels.
        newline: which picture rows end with a newline token: "kept-rows", "all" or "none".
        newline_file: the newline's embedding [hidden] float32, relative to the bundle.
        keep_total: tokens of one picture over all its tiles, newlines not counted; None where each tile
            keeps what the spec says.
        min_for_base: tokens that the base tile gets at least, with `keep_total`.
    """

    pinpoints: tuple[tuple[int, int], ...]
    newline: str
    newline_file: str
    keep_total: int | None
    min_for_base: int


@dataclass(frozen=True)
class DecoderManifest:
    """The language model as graphs in the bundle.

    Attributes:
        file: the decoder, `inputs_embeds` and a KV cache in, logits of the last position out.
        embeddings: the token embedding table, [vocab, hidden] in a .npy file.
        precision: fp32, int8, int4, w8a8, fp16 or int4-fp16.
        block_size: weights that share a scale; None where they are not rounded in blocks.
        prefill_file: a second decoder with the same inputs and outputs, for prompts; None where `file` runs them.
        prefill_precision: of that: w8a8; likewise.
        dtype: what the decoder takes and gives and its KV cache holds, float32 or float16.
    """

    file: str
    embeddings: str
    precision: str
    block_size: int | None
    prefill_file: str | None
    prefill_precision: str | None
    dtype: str


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request takes where it says nothing, by the checkpoint's generation config; see SamplingParams."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class LanguageManifest:
    """The language model, in the bundle or in the checkpoint.

    Attributes:
        decoder: its graphs; None where the bundle leaves it to the checkpoint.
        num_layers, num_kv_heads, head_size, hidden_size, vocab_size: sizes of the model.
        context_length: most positions, prompt and answer together.
        image_token_id: the placeholder that an image's tokens replace.
        eos_token_ids: tokens that end an answer.
        sampling: what a request takes where it says nothing.
    """

    decoder: DecoderManifest | None
    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    context_length: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingDefaults

    def check(self) -> None:
        """Refuse values that no export writes.

        Raises:
            ValueError: the first that was found.
        """
        for name, token_id in [
            ("image_token_id", self.image_token_id),
            *[("eos_token_ids", i) for i in self.eos_token_ids],
        ]:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"language.{name} is {token_id}, outside of a vocabulary of {self.vocab_size}")
        sampling = self.sampling
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"language.sampling is {sampling}, out of range")
        if sampling.repetition_penalty <= 0:
            raise ValueError(f"language.sampling.repetition_penalty is {sampling.repetition_penalty}")
        if self.decoder is not None and self.decoder.dtype not in ("float32", "float16"):
            raise ValueError(f"language.decoder.dtype is {self.decoder.dtype!r}, expected float32 or float16")


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file of the bundle."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceManifest:
    """The checkpoint that a bundle was exported from.

    Attributes:
        name: of its folder, or its id on the hub.
        revision: the commit on the hub; None where it came from a folder.
        fingerprint: tells checkpoints apart; see CheckpointWeights.fingerprint.
        language_fingerprint: the same for the language model alone; None where the bundle holds no decoder.
    """

    name: str
    revision: str | None
    fingerprint: str
    language_fingerprint: str | None


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        family: the architecture, "llava" or "llava_next".
        source: the checkpoint.
        pruning: the spec with its layers resolved; None where nothing is pruned.
        vision: the vision graph.
        tiling: how pictures become tiles; None for LLaVA-1.5, where a picture is one tile.
        language: the language model; None in an encoder bundle.
        verification: what was compared with PyTorch at export, and the errors reached.
        versions: of the packages that wrote the bundle.
        files: every file but the manifest, by its path relative to the bundle.
        schema_version: of this layout.
    """

    family: str
    source: SourceManifest
    pruning: PruningSpec | None
    vision: VisionManifest
    tiling: TilingManifest | None
    language: LanguageManifest | None
    verification: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The manifest as it is written."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, content: bytes | str) -> Manifest:
        """Read a manifest; the schema version is checked before anything else.

        Raises:
            BundleError: not JSON, of another schema, with keys missing, unknown or of the wrong type, or with a path
                that leads out of the bundle.
        """
        try:
            raw = parse_json(content)
            version = raw["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"not a manifest of hivtp: {type(error).__name__}: {error}") from error
        if version != SCHEMA_VERSION or isinstance(version, bool):
            is_newer = isinstance(version, int) and version > SCHEMA_VERSION
            found = version if isinstance(version, int) else f"a {type(version).__name__}"
            advice = "upgrade hivtp" if is_newer else "export it again"
            raise BundleError(f"it has schema version {found}, this hivtp reads {SCHEMA_VERSION}; {advice}")
        try:
            manifest = read_record(cls, raw)
            manifest._check()
        except ValueError as error:
            raise BundleError(f"its manifest is damaged: {error}; export it again") from error
        return manifest

    def used_files(self) -> Iterator[str]:
        """The files that a pipeline opens by name."""
        yield self.vision.file
        if self.tiling is not None:
            yield self.tiling.newline_file
        if self.language is None:
            return
        yield from (f"{PROCESSOR_FOLDER}/{name}" for name in PROCESSOR_FILES)
        decoder = self.language.decoder
        if decoder is not None:
            yield decoder.file
            yield decoder.embeddings
            if decoder.prefill_file is not None:
                yield decoder.prefill_file

    def _check(self) -> None:
        """Refuse values that no export writes.

        Raises:
            ValueError: the first that was found.
        """
        vision, language = self.vision, self.language
        sizes = {
            "vision.num_layers": vision.num_layers,
            "vision.grid[0]": vision.grid[0],
            "vision.grid[1]": vision.grid[1],
            "vision.image_size": vision.image_size,
            "vision.capacity": vision.capacity,
            "vision.hidden_size": vision.hidden_size,
        }
        if language is not None:
            names = ("num_layers", "num_kv_heads", "head_size", "hidden_size", "vocab_size", "context_length")
            sizes |= {f"language.{name}": getattr(language, name) for name in names}
        for name, size in sizes.items():
            if not 1 <= size <= MAX_SIZE:
                raise ValueError(f"{name} is {size}, expected 1 to {MAX_SIZE}")
        if vision.num_prefix_tokens not in (0, 1):
            raise ValueError(f"vision.num_prefix_tokens is {vision.num_prefix_tokens}, expected 0 or 1")
        if vision.capacity > vision.num_patches:
            raise ValueError(f"vision.capacity is {vision.capacity}, more than the {vision.num_patches} patches")
        if self.pruning is not None:
            self._check_pruning(self.pruning)
        if (self.family, self.tiling is None) not in {("llava", True), ("llava_next", False)}:
            tiling = "has no tiling" if self.tiling is None else "has a tiling"
            raise ValueError(f"its family is {self.family!r}, and it {tiling}")
        if language is not None:
            language.check()
        for name, record in self.files.items():
            _check_name(name)
            if record.num_bytes < 0:
                raise ValueError(f"{name} has {record.num_bytes} bytes")
        for name in self.used_files():
            if name not in self.files:
                raise ValueError(f"it uses {name!r}, which is not among its files")

    def _check_pruning(self, spec: PruningSpec) -> None:
        if spec.first_layer is None or spec.num_layers is None:
            raise SpecError("pruning names no layers")
        if spec.capacity(self.vision.grid) != self.vision.capacity:
            raise SpecError(f"the rule keeps up to {spec.capacity(self.vision.grid)}, not {self.vision.capacity}")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, check_hashes: bool = False) -> Bundle:
        """Open a bundle after checking its schema, and that every file is there, inside, and of the right size.

        A bundle is data, and it may come from a stranger. Nothing outside of its folder is read.

        Args:
            folder: the bundle.
            check_hashes: also read every file and compare its sha256, and refuse files beside the graphs that the
                manifest does not list. That finds damage; it says nothing of who wrote the manifest.

        Raises:
            BundleError: what is wrong, and what to do.
        """
        try:
            folder = Path(folder)
            content = cls._read_manifest(folder)
            bundle = cls(folder, Manifest.from_json(content))
        except (BundleError, OSError, ValueError) as error:
            raise BundleError(f"cannot open the bundle {folder}: {_reason(error)}") from error
        bundle._check_files(check_hashes=check_hashes)
        return bundle

    @property
    def processor_folder(self) -> Path:
        """Where tokenizer, chat template and image preprocessing lie."""
        return self.folder / PROCESSOR_FOLDER

    @property
    def vision_file(self) -> Path:
        """The vision graph."""
        return self.folder / self.manifest.vision.file

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of the processor folder.

        Raises:
            BundleError: the file is missing or damaged.
        """
        file = self.processor_folder / name
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {file}: {_reason(error)}; copy or export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{file} holds no JSON object; copy or export the bundle again")
        return content

    def read_bytes(self, name: str) -> bytes:
        """Read a small file of the manifest.

        Raises:
            BundleError: it cannot be read, or is large.
        """
        try:
            return read_regular(self.folder / name, MAX_ARRAY_BYTES)
        except OSError as error:
            file = self.folder / name
            raise BundleError(f"cannot read {file}: {_reason(error)}; copy or export the bundle again") from error

    @staticmethod
    def _read_manifest(folder: Path) -> bytes:
        if not folder.is_dir():
            raise BundleError("it is not a folder; give the folder that hivtp export wrote")
        if not (folder / MANIFEST_NAME).exists():
            raise BundleError(f"it has no {MANIFEST_NAME}; give the folder that hivtp export wrote")
        return read_regular(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)

    def _check_files(self, *, check_hashes: bool) -> None:
        roots = _allowed_roots(self.folder)
        for name, record in self.manifest.files.items():
            file = self.folder / name
            place = Path(os.path.realpath(file))
            if not any(place.is_relative_to(root) for root in roots):
                raise BundleError(f"{name} of the bundle {self.folder} is a link that leads out of it; do not use it")
            if not file.is_file():
                found = "is not a regular file" if file.exists() else "is missing"
                raise BundleError(f"{name} of the bundle {self.folder} {found}; copy or export it again")
            num_bytes = file.stat().st_size
            if num_bytes != record.num_bytes:
                raise BundleError(
                    f"{name} of the bundle {self.folder} has {num_bytes} bytes instead of {record.num_bytes}; "
                    "it is truncated or altered: copy or export it again"
                )
            if check_hashes and sha256_of(file) != record.sha256:
                raise BundleError(
                    f"{name} of the bundle {self.folder} was altered: its sha256 differs from the manifest's; "
                    "copy or export it again"
                )
        if check_hashes:
            self._check_unlisted()

    def _check_unlisted(self) -> None:
        """Refuse files beside the graphs that are not listed: a graph may read them as its weights."""
        for folder in {str(PurePosixPath(name).parent) for name in self.manifest.files}:
            for file in sorted((self.folder / folder).iterdir()):
                name = file.relative_to(self.folder).as_posix()
                if name not in self.manifest.files and not file.is_dir() and name != MANIFEST_NAME:
                    raise BundleError(
                        f"the bundle {self.folder} holds {name}, which its manifest does not list; delete it, or copy "
                        "or export the bundle again"
                    )


def _allowed_roots(folder: Path) -> list[Path]:
    """Where the files of a bundle may lie: in its folder, or in the cache of the Hugging Face hub that links to it."""
    root = Path(os.path.realpath(folder))
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    return roots


def _check_name(name: str) -> None:
    """Refuse a path that is not plainly relative.

    Raises:
        ValueError: it is not.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(mark in name for mark in "\\\0:"):
        raise ValueError(f"{name[:80]!r} is not a relative path inside the bundle")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
