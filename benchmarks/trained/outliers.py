"""8 bits beside outliers like CLIP's, at the width and depth of ViT-L: `python -m benchmarks.trained.outliers`.

No trained ViT-L is at hand, so its outliers are made: norms with a few large gains, and a neuron that fires on few
patches and writes hundreds into three channels of the residual, as massive activations do (arXiv 2402.17762). Other
weights are random. What it shows is whether rounding holds beside such channels and tokens, not what CLIP sees.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.checkpoints import make_tokenizer, write_processor
from benchmarks.timing.table import aligned
from benchmarks.trained.packages import photographs
from hivtp.engines import create_engine
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.graph.builder import save_model
from hivtp.export.graph.calibration import activation_maxima
from hivtp.export.graph.shape import VisionShape
from hivtp.export.graph.vision import build_vision_graph
from hivtp.export.settings import ExportSettings
from hivtp.export.verify.samples import generated_runs
from hivtp.export.verify.vision import verify_vision
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.vision.agreement import compare_outputs
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

NUM_IMAGES = 4
# A tokenizer of bytes has these many tokens, the last for the image.
IMAGE_SIZE, VOCABULARY = 224, 260
# Per norm: channels with a large gain, in the first layer larger still.
NUM_LARGE, LARGE, LARGEST = 10, (5.0, 12.0), 30.0
# Where a neuron fires, how high, on how many patches of all images, and what it writes into three channels.
MASSIVE_LAYER, FIRES_AT, NUM_FIRING, MASSIVE = 11, 40.0, 16, (300.0, 166.0, 106.0)
QUERY_BIAS = 1.0


def write_checkpoint(folder: Path, images: Sequence[Path]) -> Path:
    """Write a LLaVA checkpoint with the vision tower of CLIP ViT-L/14 at 224 px, and outliers on these images."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=IMAGE_SIZE, patch_size=14, projection_dim=768,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=VOCABULARY
        ),
        image_token_index=VOCABULARY - 1,
    )  # fmt: skip
    config.architectures = ["LlavaForConditionalGeneration"]
    model = transformers.LlavaForConditionalGeneration(config).eval()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        _add_outliers(model.model.vision_tower)
        model.save_pretrained(folder)
        write_processor(folder, config, make_tokenizer(VOCABULARY))
        pixels = _pixels(Checkpoint.open(folder, is_quiet=True), images)
        _add_massive_tokens(model.model.vision_tower, torch.from_numpy(np.concatenate(pixels)))
    model.save_pretrained(folder)
    return folder


def _add_outliers(tower: torch.nn.Module) -> None:
    """Gains of the norms, and biases of queries, by which patches receive unlike attention."""
    import torch

    for index, layer in enumerate(tower.encoder.layers):
        for norm in (layer.layer_norm1, layer.layer_norm2):
            gains = torch.empty_like(norm.weight).log_normal_(-0.5, 0.3)
            large = torch.randperm(len(gains))[:NUM_LARGE]
            gains[large] = torch.empty(NUM_LARGE).uniform_(*LARGE)
            if index == 0:
                gains[large[0]] = LARGEST
            norm.weight.copy_(gains)
        layer.self_attn.q_proj.bias.normal_(0, QUERY_BIAS)


def _add_massive_tokens(tower: torch.nn.Module, pixels: torch.Tensor) -> None:
    layer, seen = tower.encoder.layers[MASSIVE_LAYER], []
    hook = layer.mlp.fc1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    tower(pixels)
    hook.remove()
    tokens = seen[0].flatten(0, 1)
    direction = tokens[7] - tokens.mean(dim=0)
    places = tokens @ direction
    firing = places.sort(descending=True).values
    threshold = firing[NUM_FIRING]
    scale = FIRES_AT / (firing[0] - threshold)
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    fc1.weight[0], fc1.bias[0] = direction * scale, -threshold * scale
    fc2.weight[:, 0] = 0
    for channel, size in enumerate(MASSIVE):
        fc2.weight[channel, 0] = size / FIRES_AT


def _pixels(checkpoint: Checkpoint, images: Sequence[Path]) -> list[np.ndarray]:
    processor = Processor.open(checkpoint)
    return [processor.pixel_values([load_image(image)]) for image in images]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the checkpoint, and print what int8 does to it beside float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["192", "64"], help="(default: 192 64)")
    options = parser.parse_args(arguments)
    images = photographs()[:NUM_IMAGES]
    rows = [["preset", "kept alike", "embeddings: error", "worst image", "median token", "export"]]
    with tempfile.TemporaryDirectory() as place:
        folder = write_checkpoint(Path(place) / "checkpoint", images)
        checkpoint = Checkpoint.open(folder, is_quiet=True)
        shape = VisionShape.of(checkpoint.config)
        maxima = activation_maxima(checkpoint, 0, generated_runs(shape.image_size), Path(place))
        for preset in options.presets:
            spec = ExportSettings(preset=preset).resolved_spec(shape)
            outputs = {}
            for precision in ("fp32", "int8"):
                file = Path(place) / precision / "model.onnx"
                found = maxima if precision == "int8" else None
                save_model(build_vision_graph(checkpoint, spec, precision, maxima=found), file)
                engine = create_engine("onnxruntime", file)
                outputs[precision] = [engine.run({"pixel_values": values}) for values in _pixels(checkpoint, images)]
            try:
                verify_vision(checkpoint, spec, file, "int8", "vision")
                verdict = "passes"
            except VerificationError as error:
                verdict = f"refused: {error}"
            agreements = [
                compare_outputs(mine, its, shape.num_prefix_tokens)
                for mine, its in zip(outputs["int8"], outputs["fp32"], strict=True)
            ]
            errors = [agreement.relative_error for agreement in agreements]
            kept = np.mean([agreement.kept_jaccard for agreement in agreements])
            middle = np.median([agreement.median_row_error for agreement in agreements])
            numbers = [f"{kept:.3f}", f"{np.mean(errors):.4f}", f"{max(errors):.4f}", f"{middle:.4f}"]
            rows.append([preset, *numbers, verdict])
    print(aligned(rows))


if __name__ == "__main__":
    main()
