"""A checkpoint as OpenVINO GenAI takes it. Runs in an environment of its own, without hivtp; see README.md.

python openvino_genai_export.py CHECKPOINT FOLDER fp32|int8|int4 [--vision-w8a8 IMAGE...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

VISION = "openvino_vision_embeddings_model"


def main() -> None:
    """Export, and quantise the vision tower where that is asked for: GenAI's own exports round its weights alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("precision", choices=("fp32", "int8", "int4"))
    parser.add_argument("--vision-w8a8", nargs="+", type=Path, help="images for the scales of its activations")
    options = parser.parse_args()
    program = Path(sys.executable).parent / "optimum-cli"
    task = ["--task", "image-text-to-text", "--weight-format", options.precision]
    subprocess.run([program, "export", "openvino", "--model", options.checkpoint, *task, options.folder], check=True)
    if options.vision_w8a8:
        quantize_vision(options.checkpoint, options.folder, options.vision_w8a8)


def quantize_vision(checkpoint: Path, folder: Path, images: list[Path]) -> None:
    """Weights and activations of the vision tower in 8 bits, by NNCF's own preset for transformers."""
    import nncf
    import openvino
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint).image_processor
    core = openvino.Core()
    # From the float model: quantising what is rounded already rounds twice.
    model = core.read_model(folder.parent / "fp32" / f"{VISION}.xml")

    def pixels(file: Path) -> Any:
        return processor(images=Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"]

    data = nncf.Dataset(images, pixels)
    quantised = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    openvino.save_model(quantised, folder / f"{VISION}.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
