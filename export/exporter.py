"""The export: from a checkpoint folder to a verified bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from hivtp.engines.bundle import (
    MANIFEST_NAME,
    PROCESSOR_FOLDER,
    Bundle,
    FileRecord,
    Manifest,
    TilingManifest,
    VisionManifest,
    sha256_of,
)
from hivtp.export.calibration import activation_ranges
from hivtp.export.checkpoint import Checkpoint
from hivtp.export.clip import VisionShape
from hivtp.export.decoder import (
    BLOCK_SIZES,
    DEFAULT_BLOCK_SIZE,
    HALF_PRECISIONS,
    NUM_BITS,
    DecoderKind,
    PrefillPrecision,
)
from hivtp.export.graph import VisionPrecision, save_model
from hivtp.export.language import LanguagePrecision, export_decoder, language_manifest, num_decoder_steps
from hivtp.export.pictures import read_pictures
from hivtp.export.processor import Processor
from hivtp.export.progress import Progress
from hivtp.export.reuse import open_source
from hivtp.export.staging import check_destination, staged
from hivtp.export.verification import verify_vision
from hivtp.export.vision import GraphKind, build_vision_graph
from hivtp_ops.errors import SpecError
from hivtp_ops.spec import PRESETS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

VISION_FILE = "vision/model.onnx"
NEWLINE_FILE = "vision/image_newline.npy"
NewlineRule = Literal["kept-rows", "all", "none"]
PACKAGES = ("hivtp", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Attributes:
        preset: name of the pruning preset, used where `spec` is None.
        spec: a pruning spec of one's own.
        first_layer: first scoring layer, 0-based; None leaves it to the spec.
        num_layers: number of scoring layers; None leaves it to the spec.
        is_pruned: False exports the unpruned model.
        vision_precision: fp32, fp16, bf16, fp8 or int8.
        calibration: for fp8: picture files, whose activations it is scaled to.
        language_precision: of the decoder: fp32, int8, int4 or w8a8 for a CPU; fp16 or int4-fp16 for a GPU; "none"
            leaves it out, for those who run the language model of the checkpoint in transformers.
        block_size: weights of a decoder of int8 or int4 that share a scale; None for DEFAULT_BLOCK_SIZE.
        prefill_precision: of a second decoder, which runs the prompts: w8a8 multiplies sooner than int8 or int4 do,
            and takes a byte more for each weight; None lets one decoder run all.
        newline: which picture rows of LLaVA-NeXT end with a newline token.
        keep_total: one budget over all tiles of a LLaVA-NeXT picture; None keeps per tile what the spec says.
        graph: "vision" for a bundle that answers; "encoder" for the graph that emits the features and the
            attention of the scoring layers, without a language model.
        decoder_from: a bundle of the same language model whose decoder is taken over instead of written again.
        overwrite: replace an existing bundle.
    """

    preset: str = "paper"
    spec: PruningSpec | None = None
    first_layer: int | None = None
    num_layers: int | None = None
    is_pruned: bool = True
    vision_precision: VisionPrecision = "fp32"
    calibration: tuple[Path, ...] = ()
    language_precision: LanguagePrecision = "fp32"
    block_size: int | None = None
    prefill_precision: PrefillPrecision | None = None
    newline: NewlineRule = "kept-rows"
    keep_total: int | None = None
    graph: GraphKind = "vision"
    decoder_from: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {
            "vision_precision": get_args(VisionPrecision),
            "language_precision": get_args(LanguagePrecision),
            "prefill_precision": (*get_args(PrefillPrecision), None),
            "newline": get_args(NewlineRule),
            "graph": get_args(GraphKind),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, allowed))}")
        if self.vision_precision == "fp8" and not self.calibration:
            raise SpecError(
                "vision_precision fp8 is scaled to pictures like those that the model is meant for: give some files "
                "with calibration (--calibration-pictures)"
            )
        if self.vision_precision != "fp8" and self.calibration:
            raise SpecError(f"calibration is for vision_precision fp8, not {self.vision_precision}; drop it")
        self._check_decoder()
        if not self.is_pruned and (self.first_layer, self.num_layers) != (None, None):
            raise SpecError("first_layer and num_layers say what scores the patches, and without pruning nothing does")
        if self.graph == "encoder" and not self.is_pruned:
            raise SpecError("the encoder graph emits the scoring layers' attention, so it needs a spec for them")
        for name in ("decoder_from", "block_size", "prefill_precision") if self.graph == "encoder" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"an encoder bundle has no decoder; drop {name}")

    @property
    def decoder(self) -> DecoderKind | None:
        """Which decoder the bundle holds; None where it holds none."""
        if self.graph == "encoder" or self.language_precision == "none":
            return None
        block_size = (self.block_size or DEFAULT_BLOCK_SIZE) if self.language_precision in NUM_BITS else None
        return DecoderKind(self.language_precision, block_size, self.prefill_precision)

    def _check_decoder(self) -> None:
        for name in ("block_size", "prefill_precision", "decoder_from") if self.language_precision == "none" else ():
            if getattr(self, name) is not None:
                raise SpecError(f"{name} is for a decoder, and language_precision none has none; drop one of the two")
        if self.prefill_precision is not None:
            self._check_prefill(self.prefill_precision)
        if self.block_size is None:
            return
        if self.language_precision not in NUM_BITS:
            raise SpecError(
                f"block_size is for weights rounded in blocks, and {self.language_precision} has none; "
                f"drop it, or choose a language_precision of {' or '.join(NUM_BITS)}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise SpecError(f"block_size is {self.block_size}; choose one of {', '.join(map(str, BLOCK_SIZES))}")

    def _check_prefill(self, precision: PrefillPrecision) -> None:
        if self.language_precision == precision:
            raise SpecError(f"language_precision {precision} runs prompts in {precision} already; drop one of the two")
        if self.language_precision in HALF_PRECISIONS:
            raise SpecError(
                f"prefill_precision is for a CPU, and language_precision {self.language_precision} for a GPU; "
                "drop one of the two"
            )

    def resolved_spec(self, shape: VisionShape) -> PruningSpec | None:
        """The spec for a vision tower: preset fitted to its grid, layers to its depth; None without pruning.

        Raises:
            SpecError: it does not fit.
        """
        return self.fitted_spec(shape).resolve(shape.num_layers) if self.is_pruned else None

    def fitted_spec(self, shape: VisionShape) -> PruningSpec:
        """The spec for a vision tower, with its layers as they are given or left open.

        With `keep_total` a tile may keep as much as the whole budget; the runtime shares it out.

        Raises:
            SpecError: it does not fit.
        """
        spec = self.spec or PruningSpec.preset(self.preset, shape.grid)
        layers = {"first_layer": self.first_layer, "num_layers": self.num_layers}
        spec = replace(spec, **{name: value for name, value in layers.items() if value is not None})
        if self.keep_total is not None:
            spec = replace(spec, keep=min(self.keep_total, shape.num_patches))
        spec.validate(shape.grid)
        return spec

    def check_family(self, checkpoint: Checkpoint, shape: VisionShape) -> None:
        """Refuse what the architecture cannot do.

        Raises:
            SpecError: a budget without tiles, without pruning, or too small for the base tile.
        """
        if self.keep_total is None:
            return
        if checkpoint.family != "llava_next":
            raise SpecError("keep_total shares a budget between the tiles of LLaVA-NeXT; this is LLaVA-1.5: use keep")
        if not self.is_pruned:
            raise SpecError("keep_total needs pruning; drop one of the two")
        least = least_for_base(shape)
        if self.keep_total < least:
            raise SpecError(f"keep_total is {self.keep_total}; the base tile alone keeps at least {least}")


def least_for_base(shape: VisionShape) -> int:
    """Tokens that the base tile gets at least from a budget: those of the smallest preset."""
    counts = [PruningSpec.preset(name, shape.grid).keep for name in PRESETS]
    return min(count for count in counts if count is not None)


def export_bundle(
    checkpoint_folder: str | Path,
    destination: str | Path,
    settings: ExportSettings,
    *,
    is_quiet: bool = False,
) -> Bundle:
    """Export a LLaVA checkpoint; each graph is compared with PyTorch before the bundle appears.

    Args:
        checkpoint_folder: a Hugging Face folder.
        destination: where the bundle will lie; whole when it appears.
        settings: what to export.
        is_quiet: print no progress.

    Raises:
        CheckpointError: the checkpoint is not supported or incomplete.
        SpecError: the pruning spec does not fit the model.
        ImageError: a picture for the calibration cannot be read.
        VerificationError: a graph differs from PyTorch by more than its tolerance.
        BundleError: the destination cannot be written.
        MissingExtraError: a package of the export extra is not installed; onnxruntime-genai is needed for a decoder
            that is written, and for nothing else.
    """
    destination = Path(destination)
    check_destination(destination, settings.overwrite)
    kind = settings.decoder
    num_steps = 4 + bool(settings.calibration)
    num_steps += num_decoder_steps(kind, is_taken_over=settings.decoder_from is not None)
    progress = Progress(num_steps, is_quiet=is_quiet)
    with progress.step(f"Checkpoint {checkpoint_folder}"):
        checkpoint = Checkpoint.open(checkpoint_folder)
        shape = VisionShape.of(checkpoint.config)
        settings.check_family(checkpoint, shape)
        spec = settings.resolved_spec(shape)
        processor = None if settings.graph == "encoder" else Processor.open(checkpoint)
        source = None
        if kind is not None and settings.decoder_from is not None:
            source = open_source(settings.decoder_from, checkpoint, kind)
        pictures = read_pictures(settings.calibration) if settings.calibration else []
    ranges = None
    if pictures:
        with progress.step(f"Ranges of activations on {len(pictures)} pictures"):
            pixel_values = (processor or Processor.open(checkpoint)).pixel_values(pictures)
            ranges = activation_ranges(checkpoint, spec, pixel_values, progress.update)
    with staged(destination) as folder:
        verification: dict[str, Any] = {}
        with progress.step(f"Vision graph, {settings.vision_precision}"):
            graph = build_vision_graph(checkpoint, spec, settings.vision_precision, settings.graph, ranges)
            save_model(graph, folder / VISION_FILE, progress.update)
        with progress.step("Vision graph against PyTorch"):
            verification["vision"] = verify_vision(
                checkpoint, spec, folder / VISION_FILE, settings.vision_precision, settings.graph
            )
            if pictures:
                verification["vision"]["calibration_pictures"] = len(pictures)
        decoder = None
        if kind is not None:
            decoder, found = export_decoder(checkpoint, folder, kind, source, progress)
            verification |= found
        with progress.step("Manifest and hashes"):
            tiling = language = None
            if processor is not None:
                processor.write(folder / PROCESSOR_FOLDER)
                tiling = _export_tiling(checkpoint, shape, settings, folder)
                language = language_manifest(checkpoint, processor, decoder)
            manifest = Manifest(
                family=checkpoint.family,
                source=_source(checkpoint, settings),
                pruning=spec,
                vision=_vision_manifest(shape, spec, settings),
                tiling=tiling,
                language=language,
                verification=verification,
                versions=package_versions(),
                files=_file_records(folder),
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(destination)


def _source(checkpoint: Checkpoint, settings: ExportSettings) -> Mapping[str, str]:
    source = {"name": checkpoint.folder.resolve().name, "fingerprint": checkpoint.fingerprint}
    if settings.decoder is None:
        return source
    return {**source, "language_fingerprint": checkpoint.language_fingerprint}


def _export_tiling(
    checkpoint: Checkpoint, shape: VisionShape, settings: ExportSettings, folder: Path
) -> TilingManifest | None:
    if checkpoint.family != "llava_next":
        return None
    newline = checkpoint.tensor("image_newline").float().numpy()
    np.save(folder / NEWLINE_FILE, newline, allow_pickle=False)
    return TilingManifest(
        pinpoints=tuple(tuple(pair) for pair in checkpoint.config.image_grid_pinpoints),
        newline=settings.newline,
        newline_file=NEWLINE_FILE,
        keep_total=settings.keep_total,
        least_for_base=least_for_base(shape),
    )


def _vision_manifest(shape: VisionShape, spec: PruningSpec | None, settings: ExportSettings) -> VisionManifest:
    return VisionManifest(
        file=VISION_FILE,
        graph=settings.graph,
        precision=settings.vision_precision,
        num_layers=shape.num_layers,
        grid=shape.grid,
        image_size=shape.image_size,
        num_prefix_tokens=shape.num_prefix_tokens,
        capacity=shape.num_patches if spec is None else spec.capacity(shape.grid),
        hidden_size=shape.hidden_size if settings.graph == "encoder" else shape.language_hidden_size,
    )


def _file_records(folder: Path) -> dict[str, FileRecord]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): FileRecord(file.stat().st_size, sha256_of(file)) for file in files}


def package_versions() -> Mapping[str, str]:
    """Versions of the packages that shape a bundle, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
