"""LLaVA-NeXT through the whole pipeline, against transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hivtp.runtime.device_rows import DeviceRows
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline
from hivtp.engines import EngineSettings
from hivtp.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.tiling import Tiler
from hivtp.runtime.vision.cache import EmbeddingCache
from hivtp.runtime.vision.encoder import open_image_encoder
from hivtp.runtime.vision.stage import VisionStage
from hivtp_ops import PruningSpec, select
from hivtp_ops.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

# (width, height): one for each tile grid, and pictures that are wide, tall, tiny and huge.
SIZES = [(128, 64), (64, 128), (128, 128), (192, 64), (64, 192), (451, 300), (300, 451), (900, 70), (70, 900), (3, 2)]
SIZES += [(2000, 1500)]
PROMPT = "What is in the picture?"
NUM_TOKENS = 12


class Reference:
    """transformers on a LLaVA-NeXT checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.tiler = Tiler.from_config(
            self.processor.image_processor.to_dict() | {"image_processor_type": "LlavaNextImageProcessor"}
        )

    def inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, Any]:
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        return self.processor(images=images, text=text, return_tensors="pt")

    def generate(self, prompt: str, images: list[Image.Image], **options: Any) -> list[int]:
        inputs = self.inputs(prompt, images)
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False} | options
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **options)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    def generate_pruned(self, prompt: str, image: Image.Image, spec: PruningSpec, rule: str) -> list[int]:
        """The same selection by hand: scores, patches on the whole picture, rows and newlines in plain loops."""
        inputs = self.inputs(prompt, [image])
        model = self.model.model
        pixels = inputs["pixel_values"][0]
        with torch.inference_mode():
            tower = model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
            features = model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)
        scores = torch.stack(tower.attentions[layers]).mean(dim=(0, 2, 3))[:, 1:].numpy().copy()
        layout = self.tiler.layout((image.height, image.width))
        scores[~layout.patch_mask((8, 8))] = -np.inf
        kept = [set(row[row >= 0].tolist()) for row in select(scores, (8, 8), spec).indices]
        sequence = [features[0, index] for index in sorted(kept[0])]
        rows, cols = layout.patch_rows((8, 8)), layout.patch_cols((8, 8))
        for row in range(rows.start, rows.stop):
            found = []
            for col in range(cols.start, cols.stop):
                tile = 1 + (row // 8) * layout.tile_cols + col // 8
                if (row % 8) * 8 + col % 8 in kept[tile]:
                    found.append(features[tile, (row % 8) * 8 + col % 8])
            sequence += found
            if rule == "all" or (rule == "kept-rows" and found):
                sequence.append(model.image_newline)
        ids = inputs["input_ids"][0]
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embed = self.model.get_input_embeddings()
        embeds = torch.cat([embed(ids[: places[0]]), torch.stack(sequence), embed(ids[places[-1] + 1 :])])[None]
        with torch.inference_mode():
            tokens = self.model.generate(inputs_embeds=embeds, max_new_tokens=NUM_TOKENS, do_sample=False)
        return tokens[0].tolist()


@pytest.fixture(scope="module", params=["llama", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next") / request.param
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    return make_checkpoint(folder, family="llava_next", language=request.param, text=text)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def export(checkpoint: Path, folder: Path, **settings: Any) -> Pipeline:
    bundle = export_bundle(checkpoint, folder / "bundle", ExportSettings(**settings), is_quiet=True)
    return Pipeline.load(bundle.folder, num_threads=1)


@pytest.fixture(scope="module")
def unpruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return export(checkpoint, tmp_path_factory.mktemp("unpruned"), is_pruned=False)


@pytest.fixture(scope="module")
def budgeted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return export(checkpoint, tmp_path_factory.mktemp("budgeted"), keep_total=40, newline="none")


def picture(photos: Path, size: tuple[int, int]) -> Image.Image:
    return load_image(photos / "coffee.png").resize(size)


@pytest.mark.parametrize("size", SIZES)
def test_unpruned_answers_equal_transformers(unpruned: Pipeline, reference: Reference, photos: Path, size) -> None:
    image = picture(photos, size)
    answer = unpruned.generate(PROMPT, [image], max_new_tokens=NUM_TOKENS)
    assert answer.token_ids == reference.generate(PROMPT, [image])
    num_placeholders = (reference.inputs(PROMPT, [image])["input_ids"] == 511).sum().item()
    assert answer.num_image_tokens == answer.num_kept_tokens == num_placeholders


def test_several_pictures_of_mixed_sizes_equal_transformers(
    unpruned: Pipeline, reference: Reference, photos: Path
) -> None:
    images = [picture(photos, size) for size in ((128, 64), (70, 300), (200, 200))]
    answer = unpruned.generate("<image>\n<image>\n<image>\n" + PROMPT, images, max_new_tokens=NUM_TOKENS)
    assert answer.token_ids == reference.generate(PROMPT, images)


@pytest.mark.parametrize("rule", ["kept-rows", "all", "none"])
def test_pruned_answers_equal_the_same_selection_in_torch(
    checkpoint: Path, reference: Reference, photos: Path, tmp_path: Path, rule: str
) -> None:
    spec = PruningSpec.preset("192", (8, 8)).resolve(6)
    pipeline = export(checkpoint, tmp_path, preset="192", newline=rule)
    for size in SIZES:
        image = picture(photos, size)
        answer = pipeline.generate(PROMPT, [image], max_new_tokens=NUM_TOKENS)
        assert answer.token_ids == reference.generate_pruned(PROMPT, image, spec, rule), size
        mask = reference.tiler.layout((image.height, image.width)).patch_mask((8, 8))
        assert len(answer.kept_indices) == len(mask)
        for kept, is_picture in zip(answer.kept_indices, mask, strict=True):
            assert is_picture[kept].all()
            assert len(kept) == min(21, is_picture.sum())


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_makes_every_picture_cost_the_same(budgeted: Pipeline, photos: Path, size) -> None:
    answer = budgeted.generate(PROMPT, [picture(photos, size)], max_new_tokens=2)
    assert answer.num_kept_tokens == 40 == sum(map(len, answer.kept_indices))
    assert len(answer.kept_indices[0]) >= 7


def test_a_picture_seen_before_costs_no_vision_run(budgeted: Pipeline, photos: Path) -> None:
    image = picture(photos, (333, 222))
    first = budgeted.generate(PROMPT, [image], max_new_tokens=5)
    stage = budgeted.images._encoder._vision
    engine, stage.engine = stage.engine, None
    try:
        again = budgeted.generate(PROMPT, [image, image][:1], max_new_tokens=5)
    finally:
        stage.engine = engine
    assert again.token_ids == first.token_ids
    assert again.kept_indices == first.kept_indices
    assert again.timings.vision_ms < first.timings.vision_ms


def test_overlay_shows_base_tile_and_grid(budgeted: Pipeline, photos: Path) -> None:
    from hivtp.runtime.vision.overlay import draw_tiles

    image = picture(photos, (128, 64))
    stream = budgeted.stream(PROMPT, [image], max_new_tokens=1)
    list(stream)
    manifest = budgeted.bundle.manifest
    [encoded] = stream.images
    overlay = draw_tiles(budgeted.images.frames(image), encoded.tiles, manifest.vision.grid, manifest.pruning)
    assert overlay.width > 2 * 672


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_total": 3}, "the base tile alone keeps at least 7"),
        ({"keep_total": 40, "is_pruned": False}, "keep_total needs pruning"),
        ({"newline": "some"}, "newline is 'some'; choose one of kept-rows, all, none"),
    ],
)
def test_a_budget_that_cannot_work_is_refused(checkpoint: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        export(checkpoint, tmp_path, **settings)


def test_a_budget_needs_tiles(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="use keep"):
        export(tiny_checkpoint, tmp_path, keep_total=40)


@pytest.mark.parametrize("pinpoints", [[], [[64]], [[64, 100]], [[0, 64]], [["64", "64"]]])
def test_corrupt_pinpoints_are_refused_by_value(tmp_path: Path, pinpoints: Any) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text()) | {"image_grid_pinpoints": pinpoints}
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="pinpoints"):
        export_bundle(folder, tmp_path / "bundle", ExportSettings(), is_quiet=True)


def test_tiles_that_stay_on_the_device_give_the_tokens_of_those_that_come_to_the_host(
    checkpoint: Path, tmp_path: Path, photos: Path
) -> None:
    settings = ExportSettings(keep_total=40, language_precision="fp16")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", settings, is_quiet=True)
    by_host = Pipeline.load(bundle.folder, num_threads=1, language_device="cpu")
    engine = OnnxRuntimeCudaEngine(bundle.vision_file, EngineSettings(num_threads=1), device="cpu")
    # Two tiles in a run, so that a picture comes from several.
    stage = VisionStage(engine, bundle.manifest.vision, 2, by_host.language.rows_device)
    images = open_image_encoder(bundle, stage, EmbeddingCache())
    on_device = Pipeline(bundle, images, by_host.template, by_host.tokenizer, by_host.language)
    for size in SIZES[:2]:
        image = picture(photos, size)
        expected, found = (some.generate(PROMPT, [image], max_new_tokens=NUM_TOKENS) for some in (by_host, on_device))
        assert (found.token_ids, found.kept_indices) == (expected.token_ids, expected.kept_indices)
        assert found.num_kept_tokens == expected.num_kept_tokens
    encoded = images.encode(on_device.prepare(PROMPT, [picture(photos, SIZES[0])]).images)
    assert isinstance(encoded[0].embeds, DeviceRows)
