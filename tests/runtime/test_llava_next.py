"""LLaVA-NeXT through the whole pipeline, against transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from benchmarks.checkpoints import make_checkpoint
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.inputs.images import load_image
from hivtp_ops import PruningSpec, select
from hivtp_ops.errors import CheckpointError, SpecError
from tests.support.answers import at_most, load

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from hivtp import Pipeline

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

    def sequence(self, inputs: dict[str, Any]) -> list[int]:
        """Where the unpruned tokens of an image come from: tile * 64 + patch, or -1 for a newline."""
        num_tiles = inputs["pixel_values"].shape[1]
        sources = torch.arange(64.0 * num_tiles).view(num_tiles, 64, 1)
        packed, _ = self.model.model.pack_image_features(
            [sources], inputs["image_sizes"], "default", image_newline=torch.tensor([-1.0])
        )
        return packed[0][:, 0].int().tolist()

    def generate_pruned(self, prompt: str, image: Image.Image, spec: PruningSpec, rule: str) -> list[int]:
        """The same selection by hand: scores, patches on the whole picture, rows and newlines in plain loops."""
        inputs = self.inputs(prompt, [image])
        model = self.model.model
        with torch.inference_mode():
            tower = model.vision_tower(inputs["pixel_values"][0], output_attentions=True, output_hidden_states=True)
            features = model.multi_modal_projector(tower.hidden_states[-2][:, 1:]).flatten(0, 1)
        layers = slice(spec.first_layer, spec.first_layer + spec.num_layers)
        scores = torch.stack(tower.attentions[layers]).mean(dim=(0, 2, 3))[:, 1:].numpy().copy()
        sequence = self.sequence(inputs)
        is_padding = ~np.isin(np.arange(scores.size), sequence).reshape(scores.shape)
        scores[is_padding] = -np.inf
        indices = select(scores, (8, 8), spec).indices
        kept = {64 * tile + patch for tile, row in enumerate(indices) for patch in row[row >= 0]}
        embeds = [features[source] for source in sequence[:64] if source in kept]
        found: list[torch.Tensor] = []
        for source in sequence[64:]:
            if source in kept:
                found.append(features[source])
            elif source == -1:
                embeds += found
                if rule == "all" or (rule == "kept-rows" and found):
                    embeds.append(model.image_newline)
                found = []
        ids = inputs["input_ids"][0]
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embed = self.model.get_input_embeddings()
        whole = torch.cat([embed(ids[: places[0]]), torch.stack(embeds), embed(ids[places[-1] + 1 :])])[None]
        with torch.inference_mode():
            tokens = self.model.generate(inputs_embeds=whole, max_new_tokens=NUM_TOKENS, do_sample=False)
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
    return load(bundle.folder)


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
    answer = unpruned.generate(PROMPT, [image], at_most(NUM_TOKENS))
    assert answer.token_ids == reference.generate(PROMPT, [image])
    num_placeholders = (reference.inputs(PROMPT, [image])["input_ids"] == 511).sum().item()
    assert answer.num_image_tokens == answer.num_kept_tokens == num_placeholders


def test_several_pictures_of_mixed_sizes_equal_transformers(
    unpruned: Pipeline, reference: Reference, photos: Path
) -> None:
    images = [picture(photos, size) for size in ((128, 64), (70, 300), (200, 200))]
    answer = unpruned.generate("<image>\n<image>\n<image>\n" + PROMPT, images, at_most(NUM_TOKENS))
    assert answer.token_ids == reference.generate(PROMPT, images)


@pytest.mark.parametrize("rule", ["kept-rows", "all", "none"])
def test_pruned_answers_equal_the_same_selection_in_torch(
    checkpoint: Path, reference: Reference, photos: Path, tmp_path: Path, rule: str
) -> None:
    spec = PruningSpec.preset("192", (8, 8)).resolve(6)
    pipeline = export(checkpoint, tmp_path, preset="192", newline=rule)
    for size in SIZES:
        image = picture(photos, size)
        answer = pipeline.generate(PROMPT, [image], at_most(NUM_TOKENS))
        assert answer.token_ids == reference.generate_pruned(PROMPT, image, spec, rule), size
        inputs = reference.inputs(PROMPT, [image])
        is_image = np.isin(np.arange(64 * inputs["pixel_values"].shape[1]), reference.sequence(inputs)).reshape(-1, 64)
        for kept, is_image_in_tile in zip(answer.kept_indices, is_image, strict=True):
            assert is_image_in_tile[kept].all()
            assert len(kept) == min(21, is_image_in_tile.sum())


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_makes_every_picture_cost_the_same(budgeted: Pipeline, photos: Path, size) -> None:
    answer = budgeted.generate(PROMPT, [picture(photos, size)], at_most(2))
    assert answer.num_kept_tokens == 40 == sum(map(len, answer.kept_indices))
    assert len(answer.kept_indices[0]) >= 7


def test_a_picture_seen_before_costs_no_vision_run(budgeted: Pipeline, photos: Path) -> None:
    image = picture(photos, (333, 222))
    first = budgeted.generate(PROMPT, [image], at_most(5))
    stage = budgeted.model.images._encoder._vision
    engine, stage.engine = stage.engine, None
    try:
        again = budgeted.generate(PROMPT, [image, image][:1], at_most(5))
    finally:
        stage.engine = engine
    assert again.token_ids == first.token_ids
    assert again.kept_indices == first.kept_indices
    assert again.timings.vision_ms < first.timings.vision_ms


def test_overlay_shows_base_tile_and_grid(budgeted: Pipeline, photos: Path) -> None:
    from hivtp.runtime.vision.overlay import draw_tiles

    image = picture(photos, (128, 64))
    stream = budgeted.stream(PROMPT, [image], at_most(1))
    list(stream)
    manifest = budgeted.model.bundle.manifest
    [encoded] = stream.images
    overlay = draw_tiles(budgeted.model.images.frames(image), encoded.tiles, manifest.vision.grid, manifest.pruning)
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
