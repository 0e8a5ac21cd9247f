"""The manifest of a bundle as records: what each file is, and how the model runs."""

from __future__ import annotations

import json
from collections.abc import Mapping  # noqa: TC003  the hints are read at run time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from hivtp_ops.spec import PruningSpec  # noqa: TC001  the hints are read at run time

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA_VERSION = 6
PROCESSOR_FOLDER = "processor"
PROCESSOR_FILES = ("tokenizer.json", "image_processor.json", "prompt.json")


@dataclass(frozen=True)
class VisionManifest:
    """The vision graph.

    Attributes:
        file: the graph, relative to the bundle.
        graph: "vision" (pruned embeddings) or "encoder" (features and attention).
        precision: of its weights and products.
        num_layers: layers of the vision tower, including those that do not run.
        grid: rows and columns of patches in one tile.
        image_size: side of a tile in pixels.
        num_prefix_tokens: tokens before the patches (1 where the CLS is a feature).
        capacity: most patches that one tile keeps.
        hidden_size: width of one output token.
    """

    file: str
    graph: Literal["vision", "encoder"]
    precision: Literal["fp32", "fp16", "fp8", "int8"]
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
    def seen_size(self) -> int:
        """Side in pixels of what the patches of a tile cover; the pixels after it are not seen."""
        return self.image_size // self.grid[0] * self.grid[0]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one tile before pruning."""
        return self.num_prefix_tokens + self.num_patches


@dataclass(frozen=True)
class TilingManifest:
    """How LLaVA-NeXT and LLaVA-OneVision lay an image on tiles and put their tokens in order.

    Attributes:
        pinpoints: (height, width) of every tile grid, in pixels.
        newline: which rows of patches end with a newline token: "kept-rows", "all" or "none".
        newline_file: the newline's embedding [hidden] float32, relative to the bundle.
        keep_total: tokens of one image over all its tiles, newlines not counted; None where each tile keeps what the
            spec says.
        min_for_base: least tokens of the base tile, with `keep_total`.
        max_view_tiles: a view of more patches than this many tiles have is interpolated to fewer; None where none is.
    """

    pinpoints: tuple[tuple[int, int], ...]
    newline: str
    newline_file: str
    keep_total: int | None
    min_for_base: int
    max_view_tiles: int | None


@dataclass(frozen=True)
class DecoderManifest:
    """The language model as graphs in the bundle.

    Attributes:
        file: the decoder, `inputs_embeds` and a KV cache in, logits of the last position out.
        embeddings: the token embedding table, [vocab, hidden] in a .npy file.
        precision: fp32, int8, int4, w8a8, fp16 or int4-fp16.
        block_size: weights that share a scale; None where they are not rounded in blocks.
        prefill_file: a second decoder with the same inputs and outputs, for prompts; None where `file` runs them.
        prefill_precision: of that decoder: w8a8; None where there is none.
        dtype: of the decoder's inputs, outputs and KV cache.
    """

    file: str
    embeddings: str
    precision: str
    block_size: int | None
    prefill_file: str | None
    prefill_precision: str | None
    dtype: Literal["float32", "float16"]


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
    """What a bundle says of itself.

    Attributes:
        family: the architecture, "llava", "llava_next" or "llava_onevision".
        source: the checkpoint.
        pruning: the spec with its layers resolved; None where nothing is pruned.
        vision: the vision graph.
        tiling: how images become tiles; None for LLaVA-1.5, where an image is one tile.
        language: the language model; None in an encoder bundle.
        verification: what was compared with PyTorch at export, and the errors reached.
        versions: of the packages that wrote the bundle.
        files: every file except the manifest and plans, by its path relative to the bundle.
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

    @property
    def cuts_single_images(self) -> bool:
        """Whether an image is cut into tiles only where it is the only one of a conversation."""
        return self.family == "llava_onevision"

    def to_json(self) -> str:
        """The manifest as it is written."""
        return json.dumps(asdict(self), indent=2) + "\n"

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
