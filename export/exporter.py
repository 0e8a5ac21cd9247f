"""The export: from a checkpoint folder to a verified bundle."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines.bundle import MANIFEST_NAME, Bundle, sha256_of
from hivtp.engines.manifest import (
    PROCESSOR_FOLDER,
    FileRecord,
    Manifest,
    SourceManifest,
    TilingManifest,
    VisionManifest,
)
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.generation import GenerationDefaults
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.decoder.reuse import open_source
from hivtp.export.decoder.rounding.text import calibration_text
from hivtp.export.decoder.support import check_decoder
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima, first_fp8_layer
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.language import export_decoder, language_manifest, num_decoder_steps
from hivtp.export.progress import Progress
from hivtp.export.settings import min_for_base
from hivtp.export.space import check_space
from hivtp.export.staging.destination import check_destination
from hivtp.export.staging.staged import staged
from hivtp.export.verify.opening import open_and_ask
from hivtp.export.verify.samples import generated_runs
from hivtp.export.verify.text import check_token_ids
from hivtp.export.verify.vision import verify_vision
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.interpolation import max_view_tiles
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from hivtp.export.settings import ExportSettings
    from hivtp_ops.spec import PruningSpec

VISION_FILE = "vision/model.onnx"
NEWLINE_FILE = "vision/image_newline.npy"
PACKAGES = ("hivtp", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


def export_bundle(
    checkpoint_folder: str | Path,
    destination: str | Path,
    settings: ExportSettings,
    *,
    is_quiet: bool = False,
) -> Bundle:
    """Export a LLaVA checkpoint.

    Before the bundle appears, each graph is compared with PyTorch, and the bundle is opened and asked about an image.

    Args:
        checkpoint_folder: a Hugging Face folder, or the id of a repository on the hub, which is downloaded.
        destination: where the bundle will lie; whole when it appears.
        settings: what to export.
        is_quiet: print no progress.

    Raises:
        CheckpointError: the checkpoint is not supported or incomplete.
        HubError: a checkpoint of the hub cannot be downloaded.
        SpecError: the pruning spec does not fit the model, or the calibration text is no use.
        ImageError: an image for the calibration cannot be read.
        VerificationError: a graph differs from PyTorch by more than its tolerance, or the bundle cannot be used.
        BundleError: the destination cannot be written.
        MissingExtraError: a package of the export extra is not installed; onnxruntime-genai is needed for a decoder
            that is written, and for nothing else.
    """
    settings.check_calibration()
    place = check_destination(Path(destination), settings.overwrite, Path(checkpoint_folder))
    kind = settings.decoder
    num_steps = 5 + bool(settings.calibration)
    num_steps += num_decoder_steps(kind, is_taken_over=settings.decoder_from is not None)
    progress = Progress(num_steps, is_quiet=is_quiet)
    with staged(place) as folder:
        with progress.step(f"Checkpoint {checkpoint_folder}"):
            checkpoint = Checkpoint.open(
                checkpoint_folder, settings.revision, original=settings.original, is_quiet=is_quiet
            )
            shape = VisionShape.of(checkpoint.config)
            settings.check_family(checkpoint, shape)
            spec = settings.resolved_spec(shape)
            processor = generation = source = text = token_ids = None
            if settings.graph != "encoder":
                processor = Processor.open(checkpoint, settings.chat_template)
                generation = GenerationDefaults.of(checkpoint, processor.tokenizer)
                generation.warn_of_ignored(checkpoint.folder)
            if kind is not None:
                check_decoder(checkpoint)
            if kind is not None and settings.decoder_from is not None:
                source = open_source(settings.decoder_from, checkpoint, kind)
            elif kind is not None and processor is not None:
                token_ids = check_token_ids(checkpoint, processor)
                if kind.rounding == "calibrated":
                    text = calibration_text(
                        processor.tokenizer, checkpoint.config.text_config, settings.calibration_text
                    )
            check_space(checkpoint, settings, folder)
        verification: dict[str, Any] = {}
        maxima = None
        if settings.calibration:
            with progress.step(f"Calibration on {len(settings.calibration)} images"):
                runs = _calibration_runs(settings, processor or Processor.open(checkpoint), progress)
                maxima = activation_maxima(checkpoint, first_fp8_layer(spec, shape), runs, folder)
        with progress.step(f"Vision graph, {settings.vision_precision}"):
            if settings.vision_precision == "int8":
                maxima = activation_maxima(checkpoint, 0, generated_runs(shape.image_size), folder)
            graph = build_vision_graph(checkpoint, spec, settings.vision_precision, settings.graph, maxima)
            save_model(graph, folder / VISION_FILE, progress.update)
        with progress.step("Vision graph against PyTorch"):
            verification["vision"], settings = _checked_vision(checkpoint, spec, settings, folder, progress)
            if settings.calibration:
                verification["vision"]["calibration_images"] = len(settings.calibration)
        decoder = None
        if kind is not None:
            decoder, found = export_decoder(checkpoint, folder, kind, source, progress, text, token_ids)
            verification |= found
        with progress.step("Manifest and hashes"):
            tiling = language = None
            if processor is not None and generation is not None:
                processor.write(folder / PROCESSOR_FOLDER)
                tiling = _export_tiling(checkpoint, shape, settings, folder)
                language = language_manifest(checkpoint, generation, decoder)
            origin = _source(checkpoint, settings)
            # After the last weight was read.
            checkpoint.check_unchanged()
            manifest = Manifest(
                family=checkpoint.family,
                source=origin,
                pruning=spec,
                vision=_vision_manifest(shape, spec, settings),
                tiling=tiling,
                language=language,
                verification=verification,
                versions=package_versions(),
                files=_file_records(folder),
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        with progress.step("The bundle opened and asked"):
            open_and_ask(folder, checkpoint, processor)
    return Bundle.open(place.path)


def _checked_vision(
    checkpoint: Checkpoint, spec: PruningSpec | None, settings: ExportSettings, folder: Path, progress: Progress
) -> tuple[dict[str, Any], ExportSettings]:
    """The report of the check, and the settings by which the graph was written: the fallback's where it refused.

    Raises:
        VerificationError: no precision passes.
    """
    file = folder / VISION_FILE
    try:
        return verify_vision(checkpoint, spec, file, settings.vision_precision, settings.graph), settings
    except VerificationError as error:
        if settings.vision_fallback is None:
            raise
        refused = f"{settings.vision_precision}: {error}"
    for part in file.parent.iterdir():
        part.unlink()
    settings = replace(settings, vision_precision=settings.vision_fallback, vision_fallback=None)
    save_model(build_vision_graph(checkpoint, spec, settings.vision_precision, settings.graph), file, progress.update)
    found = verify_vision(checkpoint, spec, file, settings.vision_precision, settings.graph)
    return {**found, "refused": refused}, settings


def _calibration_runs(
    settings: ExportSettings, processor: Processor, progress: Progress
) -> Iterator[NDArray[np.float32]]:
    """The pixels of one image after the other, so that memory does not grow with their number."""
    for done, file in enumerate(settings.calibration, start=1):
        yield processor.pixel_values([load_image(file)])
        progress.update(done, len(settings.calibration))


def _source(checkpoint: Checkpoint, settings: ExportSettings) -> SourceManifest:
    language = None if settings.decoder is None else checkpoint.language_fingerprint
    source = checkpoint.source
    return SourceManifest(source.name, source.revision, checkpoint.fingerprint, language)


def _export_tiling(
    checkpoint: Checkpoint, shape: VisionShape, settings: ExportSettings, folder: Path
) -> TilingManifest | None:
    if not checkpoint.is_tiled:
        return None
    newline = checkpoint.tensor("image_newline").float().numpy()
    np.save(folder / NEWLINE_FILE, newline, allow_pickle=False)
    return TilingManifest(
        pinpoints=tuple(tuple(pair) for pair in checkpoint.config.image_grid_pinpoints),
        newline=settings.newline,
        newline_file=NEWLINE_FILE,
        keep_total=settings.keep_total,
        min_for_base=min_for_base(shape),
        max_view_tiles=max_view_tiles(checkpoint.config),
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
