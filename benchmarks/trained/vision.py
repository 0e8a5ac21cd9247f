"""What rounding does to a trained tower: kept patches, embeddings and scores against float32, image by image."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hivtp.engines import create_engine
from hivtp.engines.base import EngineSettings
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.layers.choice import choose_layers
from hivtp.export.layers.ranking import ChoiceSettings
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.samples import generated_runs
from hivtp.export.verify.vision import verify_vision
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.agreement import compare_outputs
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hivtp.engines.base import Arrays
    from hivtp.export.graph.builder import VisionPrecision
    from hivtp.export.layers.ranking import LayerRange

REFERENCE: VisionPrecision = "fp32"
PRECISIONS: tuple[VisionPrecision, ...] = (REFERENCE, "fp16", "int8")
PRESETS = ("192", "64")


def measure_vision(
    checkpoint_folder: Path, images: Sequence[Path], work_dir: Path, num_threads: int
) -> list[dict[str, Any]]:
    """Compare every precision at every preset, with the default layers and with those that `hivtp layers` chooses.

    Returns:
        For each of them the layers, the verdict of the export's check, which has images of its own, and for each image
        how it agrees with the float32 graph.
    """
    checkpoint = Checkpoint.open(checkpoint_folder, is_quiet=True)
    shape = VisionShape.of(checkpoint.config)
    processor = Processor.open(checkpoint)
    pixels = [processor.pixel_values([load_image(image)]) for image in images]
    work_dir.mkdir(parents=True, exist_ok=True)
    maxima = activation_maxima(checkpoint, 0, generated_runs(shape.image_size), work_dir)
    rows = []
    for preset in PRESETS:
        for choice, layers in _layers(checkpoint_folder, images, preset).items():
            wanted = ExportSettings(
                preset=preset, first_layer=layers.first_layer, num_layers=layers.num_layers
            ).resolved_spec(shape)
            expected: list[Arrays] = []
            for precision in PRECISIONS:
                print(f"  {precision} vision, preset {preset}, layers {layers} ({choice})", flush=True)
                file = work_dir / f"{precision}-{preset}-{layers}" / "model.onnx"
                found_maxima = maxima if precision == "int8" else None
                save_model(build_vision_graph(checkpoint, wanted, precision, maxima=found_maxima), file)
                try:
                    verify_vision(checkpoint, wanted, file, precision, "vision")
                    refusal = None
                except VerificationError as error:
                    refusal = str(error)
                engine = create_engine("onnxruntime", file, EngineSettings(num_threads=num_threads))
                found: list[Arrays] = [engine.run({"pixel_values": values}) for values in pixels]
                expected = expected or found
                agreements = [
                    compare_outputs(mine, its, shape.num_prefix_tokens)
                    for mine, its in zip(found, expected, strict=True)
                ]
                rows.append(
                    {
                        "preset": preset,
                        "choice": choice,
                        "layers": asdict(layers),
                        "precision": precision,
                        "refusal": refusal,
                        "images": {
                            image.name: asdict(agreement) for image, agreement in zip(images, agreements, strict=True)
                        },
                    }
                )
    return rows


def _layers(checkpoint: Path, images: Sequence[Path], preset: str) -> dict[str, LayerRange]:
    """By features: the language model of this checkpoint cannot read images."""
    settings = ChoiceSettings(criterion="features")
    ranking = choose_layers(checkpoint, images, ExportSettings(preset=preset), settings, is_quiet=True)
    return {"default": ranking.default, "chosen": ranking.best}
