"""The bundle: a folder of graphs and settings, with a manifest that says what each file is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping  # noqa: TC003  the hints are read at run time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hivtp.engines.record import read_record
from hivtp_ops.errors import BundleError
from hivtp_ops.spec import PruningSpec

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"
PROCESSOR_FOLDER = "processor"


@dataclass(frozen=True)
class VisionManifest:
    """The vision graph.

    Attributes:
        file: the graph, relative to the bundle.
        graph: "vision" (pruned embeddings) or "encoder" (features and attention).
        precision: fp32, fp16, bf16, fp8 or int8.
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
    def num_image_tokens(self) -> int:
        """Tokens of one tile before pruning."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TilingManifest:
    """How LLaVA-NeXT lays a picture on tiles and its tokens in a row.

    Attributes:
        pinpoints: (height, width) of every tile grid, in pixels.
        newline: which picture rows end with a newline token: "kept-rows", "all" or "none".
        newline_file: the newline's embedding [hidden] float32, relative to the bundle.
        keep_total: tokens of one picture over all its tiles, newlines not counted; None where each tile
            keeps what the spec says.
        least_for_base: tokens that the base tile gets at least, with `keep_total`.
    """

    pinpoints: tuple[tuple[int, int], ...]
    newline: str
    newline_file: str
    keep_total: int | None
    least_for_base: int


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
        embed_file: token ids to rows of the table, as a graph; None where the decoder is not made for a GPU.
        insert_file: rows put into such rows, as a graph; likewise.
    """

    file: str
    embeddings: str
    precision: str
    block_size: int | None
    prefill_file: str | None
    prefill_precision: str | None
    dtype: str
    embed_file: str | None
    insert_file: str | None


@dataclass(frozen=True)
class LanguageManifest:
    """The language model, in the bundle or in the checkpoint.

    Attributes:
        decoder: its graphs; None where the bundle leaves it to the checkpoint.
        num_layers, num_kv_heads, head_size, hidden_size, vocab_size: sizes of the model.
        context_length: most positions, prompt and answer together.
        image_token_id: the placeholder that an image's tokens replace.
        eos_token_ids: tokens that end an answer.
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


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file of the bundle."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        family: the architecture, "llava" or "llava_next".
        source: name and fingerprint of the checkpoint, and where there is a decoder the language model's own.
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
    source: Mapping[str, str]
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
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest; the schema version is checked before anything else.

        Raises:
            BundleError: not JSON, of another schema, or with keys missing, unknown or of the wrong kind.
        """
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"not a manifest of hivtp: {type(error).__name__}: {error}") from error
        if version != SCHEMA_VERSION:
            advice = "upgrade hivtp" if isinstance(version, int) and version > SCHEMA_VERSION else "export it again"
            raise BundleError(f"it has schema version {version!r}, this hivtp reads {SCHEMA_VERSION}; {advice}")
        try:
            vision = read_record(VisionManifest, raw["vision"])
            language = None if raw["language"] is None else _read_language(raw["language"])
            tiling = None if raw["tiling"] is None else read_record(TilingManifest, raw["tiling"])
            files = {path: read_record(FileRecord, record) for path, record in raw["files"].items()}
            pruning = None if raw["pruning"] is None else PruningSpec.from_dict(raw["pruning"])
            parts = {"vision": vision, "tiling": tiling, "language": language, "files": files, "pruning": pruning}
            manifest: Manifest = read_record(cls, raw | parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"its manifest is damaged: {type(error).__name__}: {error}; export it again") from error
        return manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, check_hashes: bool = False) -> Bundle:
        """Open a bundle after checking its schema and the presence and size of every file.

        Args:
            folder: the bundle.
            check_hashes: also read every file and compare its sha256.

        Raises:
            BundleError: what is wrong, and what to do.
        """
        folder = Path(folder)
        manifest_file = folder / MANIFEST_NAME
        if not manifest_file.is_file():
            found = f"has no {MANIFEST_NAME}" if folder.is_dir() else "is not a folder"
            raise BundleError(f"{folder} {found}; give the folder that hivtp-export wrote")
        try:
            manifest = Manifest.from_json(manifest_file.read_text(encoding="utf-8"))
        except (BundleError, UnicodeDecodeError, OSError) as error:
            raise BundleError(f"cannot open the bundle {folder}: {error}") from error
        bundle = cls(folder, manifest)
        bundle._check_files(check_hashes)
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
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {file}: {error}; copy or export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{file} holds no JSON object; copy or export the bundle again")
        return content

    def _check_files(self, check_hashes: bool) -> None:
        for name, record in self.manifest.files.items():
            file = self.folder / name
            if not file.is_file():
                raise BundleError(f"the bundle {self.folder} lacks {name}; copy or export it again")
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


def _read_language(raw: Mapping[str, Any]) -> LanguageManifest:
    decoder = None if raw["decoder"] is None else read_record(DecoderManifest, raw["decoder"])
    language: LanguageManifest = read_record(LanguageManifest, {**raw, "decoder": decoder})
    return language


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
