"""The export: from a checkpoint folder to a verified bundle."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hivtp.engines.bundle import (
    MANIFEST_NAME,
    PROCESSOR_FOLDER,
    Bundle,
    FileRecord,
    LanguageManifest,
    Manifest,
    VisionManifest,
    sha256_of,
)
from hivtp.export.checkpoint import Checkpoint
from hivtp.export.clip import VisionShape
from hivtp.export.decoder import LanguagePrecision, write_decoder, write_embeddings
from hivtp.export.graph import VisionPrecision, save_model
from hivtp.export.processor import Processor, end_token_ids
from hivtp.export.progress import Progress
from hivtp.export.staging import check_destination, staged
from hivtp.export.verification import verify_language, verify_vision
from hivtp.export.vision import GraphKind, build_vision_graph
from hivtp_ops.errors import SpecError
from hivtp_ops.spec import PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

VISION_FILE = "vision/model.onnx"
LANGUAGE_FOLDER = "language"
PACKAGES = ("hivtp", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Attributes:
        preset: name of the pruning preset, used where `spec` is None.
        spec: a pruning spec of one's own.
        is_pruned: False exports the unpruned model.
        vision_precision: fp32, fp16 or int8.
        language_precision: fp32, int8 or int4.
        graph: "vision" for a bundle that answers; "encoder" for the graph that emits the features and the
            attention of the scoring layers, without a language model.
        overwrite: replace an existing bundle.
    """

    preset: str = "paper"
    spec: PruningSpec | None = None
    is_pruned: bool = True
    vision_precision: VisionPrecision = "fp32"
    language_precision: LanguagePrecision = "fp32"
    graph: GraphKind = "vision"
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {
            "vision_precision": get_args(VisionPrecision),
            "language_precision": get_args(LanguagePrecision),
            "graph": get_args(GraphKind),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.graph == "encoder" and not self.is_pruned:
            raise SpecError("the encoder graph emits the scoring layers' attention, so it needs a spec for them")

    def resolved_spec(self, shape: VisionShape) -> PruningSpec | None:
        """The spec for a vision tower: preset fitted to its grid, layers to its depth.

        Raises:
            SpecError: it does not fit.
        """
        if not self.is_pruned:
            return None
        spec = self.spec or PruningSpec.preset(self.preset, shape.grid)
        spec.validate(shape.grid)
        return spec.resolve(shape.num_layers)


def export_bundle(
    checkpoint_folder: str | Path,
    destination: str | Path,
    settings: ExportSettings,
    *,
    is_quiet: bool = False,
) -> Bundle:
    """Export a LLaVA-1.5 checkpoint; each graph is compared with PyTorch before the bundle appears.

    Args:
        checkpoint_folder: a Hugging Face folder.
        destination: where the bundle will lie; whole when it appears.
        settings: what to export.
        is_quiet: print no progress.

    Raises:
        CheckpointError: the checkpoint is not supported or incomplete.
        SpecError: the pruning spec does not fit the model.
        VerificationError: a graph differs from PyTorch by more than its tolerance.
        BundleError: the destination cannot be written.
        MissingExtraError: a package of the export extra is not installed.
    """
    destination = Path(destination)
    check_destination(destination, settings.overwrite)
    progress = Progress(num_steps=4 if settings.graph == "encoder" else 7, is_quiet=is_quiet)
    with progress.step(f"Checkpoint {checkpoint_folder}"):
        checkpoint = Checkpoint.open(checkpoint_folder)
        shape = VisionShape.of(checkpoint.config)
        spec = settings.resolved_spec(shape)
        processor = None if settings.graph == "encoder" else Processor.open(checkpoint)
    with staged(destination) as folder:
        verification: dict[str, Any] = {}
        with progress.step(f"Vision graph, {settings.vision_precision}"):
            graph = build_vision_graph(checkpoint, spec, settings.vision_precision, settings.graph)
            save_model(graph, folder / VISION_FILE)
        with progress.step("Vision graph against PyTorch"):
            verification["vision"] = verify_vision(
                checkpoint, spec, folder / VISION_FILE, settings.vision_precision, settings.graph
            )
        language = None
        if processor is not None:
            language = _export_language(checkpoint, processor, folder, settings, progress, verification)
        with progress.step("Manifest and hashes"):
            if processor is not None:
                processor.write(folder / PROCESSOR_FOLDER)
            manifest = Manifest(
                family="llava",
                source={"name": checkpoint.folder.resolve().name, "fingerprint": checkpoint.fingerprint},
                pruning=spec,
                vision=_vision_manifest(shape, spec, settings),
                language=language,
                verification=verification,
                versions=package_versions(),
                files=_file_records(folder),
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(destination)


def _export_language(
    checkpoint: Checkpoint,
    processor: Processor,
    folder: Path,
    settings: ExportSettings,
    progress: Progress,
    verification: dict[str, Any],
) -> LanguageManifest:
    config, precision = checkpoint.config.text_config, settings.language_precision
    with progress.step("Token embeddings"):
        embeddings = write_embeddings(checkpoint, folder / LANGUAGE_FOLDER)
    with progress.step(f"Decoder, {precision}"):
        decoder = write_decoder(checkpoint, folder / LANGUAGE_FOLDER, precision, progress.update)
    with progress.step("Decoder against PyTorch"):
        verification["language"] = verify_language(checkpoint, decoder, precision)
    return LanguageManifest(
        file=decoder.relative_to(folder).as_posix(),
        embeddings=embeddings.relative_to(folder).as_posix(),
        precision=precision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        image_token_id=checkpoint.config.image_token_id,
        eos_token_ids=end_token_ids(checkpoint, processor.tokenizer),
    )


def _vision_manifest(shape: VisionShape, spec: PruningSpec | None, settings: ExportSettings) -> VisionManifest:
    return VisionManifest(
        file=VISION_FILE,
        graph=settings.graph,
        precision=settings.vision_precision,
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
