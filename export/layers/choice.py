"""Which layers of a vision tower should score its patches: ranges of layers, ranked on images without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.generation import GenerationDefaults
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.graph.shape import VisionShape
from hivtp.export.layers.criteria import AnswerCriterion, Cost, feature_costs
from hivtp.export.layers.ranking import ChoiceSettings, LayerRange, LayerRanking, LayerScore
from hivtp.export.progress import Progress
from hivtp.export.verify.reference import VisionReference, vision_reference
from hivtp.runtime.inputs.images import load_image
from hivtp_ops.errors import ImageError, SpecError
from hivtp_ops.selection import select
from hivtp_ops.spec import PruningSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    from hivtp.export.settings import ExportSettings

# The paper's number of layers; longer ranges are ranked on request.
MAX_NUM_LAYERS = 3
# Bounds the attention maps of the tower: 0.2 GB a layer for CLIP ViT-L/14 at 336 px.
IMAGES_PER_RUN = 8


def choose_layers(
    checkpoint_folder: str | Path,
    images: Sequence[str | Path],
    export: ExportSettings,
    settings: ChoiceSettings,
    *,
    is_quiet: bool = False,
) -> LayerRanking:
    """Rank the layer ranges that could score the patches of a checkpoint; nothing is written.

    The weights are read part by part: the vision tower, then one layer of the language model at a time. For
    LLaVA-NeXT the base tile is used, which is the whole image.

    Args:
        checkpoint_folder: a Hugging Face folder, or the id of a repository on the hub, which is downloaded.
        images: files of images like those that the model will be asked about.
        export: the export that the layers are for; a `first_layer` or `num_layers` in it limits the ranges.
        settings: how to score them.
        is_quiet: print no progress.

    Raises:
        CheckpointError: the checkpoint is not supported or incomplete.
        ImageError: an image cannot be read, or none is given.
        SpecError: the pruning spec does not fit the model, or leaves no range to rank.
        MissingExtraError: a package of the export extra is not installed.
    """
    uses_answers = settings.criterion == "answers"
    progress = Progress(num_steps=4 if uses_answers else 3, is_quiet=is_quiet)
    with progress.step(f"Checkpoint {checkpoint_folder}"):
        checkpoint = Checkpoint.open(checkpoint_folder, export.revision, original=export.original, is_quiet=is_quiet)
        shape = VisionShape.of(checkpoint.config)
        spec = _open_spec(export, shape)
        ranges = layer_ranges(shape.num_feature_layers, spec)
        processor = Processor.open(checkpoint, export.chat_template)
        if not images:
            raise ImageError("no images were given; give files of images like those that you will ask about")
        loaded = [load_image(image) for image in images]
    with progress.step(f"Vision tower on {len(loaded)} images"):
        tower = _run_tower(checkpoint, processor, loaded, shape.num_feature_layers, progress.update)
        kept = _kept_sets(tower, shape.grid, spec, ranges)
    if uses_answers:
        costs = _answer_costs(checkpoint, processor, tower, kept, settings, progress)
    else:
        with progress.step("Features of the kept tokens"):
            patches = tower.features[:, shape.num_prefix_tokens :]
            costs = [feature_costs(features, sets) for features, sets in zip(patches, kept, strict=True)]
    *scored, random = (_layer_score(column) for column in zip(*costs, strict=True))
    order = sorted(zip(ranges, scored, strict=True), key=lambda pair: (pair[1].cost, pair[0].num_layers))
    default = PruningSpec().resolve(shape.num_layers)
    assert default.first_layer is not None, "resolve sets the layers"
    assert default.num_layers is not None, "resolve sets the layers"
    return LayerRanking(settings, spec, tuple(order), LayerRange(default.first_layer, default.num_layers), random)


def layer_ranges(num_layers: int, spec: PruningSpec) -> list[LayerRange]:
    """The ranges of a tower that runs this many layers, as far as a spec leaves them open.

    Raises:
        SpecError: there is none.
    """
    counts = range(1, MAX_NUM_LAYERS + 1) if spec.num_layers is None else [spec.num_layers]
    firsts = range(num_layers) if spec.first_layer is None else [spec.first_layer]
    ranges = [LayerRange(first, count) for count in counts for first in firsts if first + count <= num_layers]
    if not ranges:
        raise SpecError(
            f"no range of layers is left: first_layer is {spec.first_layer}, num_layers {spec.num_layers}, and the "
            f"features come from the first {num_layers} layers"
        )
    return ranges


def _open_spec(export: ExportSettings, shape: VisionShape) -> PruningSpec:
    if not export.is_pruned:
        raise SpecError("without pruning no layer scores patches; leave no_pruning out")
    if export.keep_total is not None:
        raise SpecError("layers are ranked on single tiles; give the tokens of a tile with keep, not keep_total")
    return export.fitted_spec(shape)


def _run_tower(
    checkpoint: Checkpoint,
    processor: Processor,
    images: Sequence[Image],
    num_layers: int,
    report: Callable[[int, int], None],
) -> VisionReference:
    every_layer = PruningSpec(first_layer=0, num_layers=num_layers)
    runs = []
    for start in range(0, len(images), IMAGES_PER_RUN):
        report(start, len(images))
        pixel_values = processor.pixel_values(images[start : start + IMAGES_PER_RUN])
        runs.append(vision_reference(checkpoint, every_layer, pixel_values))
    return VisionReference(
        np.concatenate([run.features for run in runs]),
        np.concatenate([run.embeds for run in runs]),
        np.concatenate([run.layer_importance for run in runs if run.layer_importance is not None], axis=1),
    )


def _kept_sets(
    tower: VisionReference, grid: tuple[int, int], spec: PruningSpec, ranges: Sequence[LayerRange]
) -> list[list[NDArray[np.int64]]]:
    """For each image the patches that each range keeps, and last those that random scores keep."""
    assert tower.layer_importance is not None, "every layer scores"
    scores = [
        tower.layer_importance[layers.first_layer : layers.first_layer + layers.num_layers].mean(axis=0)
        for layers in ranges
    ]
    scores.append(np.random.default_rng(0).random(scores[0].shape, np.float32))
    selections = [select(importance, grid, spec) for importance in scores]
    return [
        [selection.indices[image, : selection.counts[image]] for selection in selections]
        for image in range(len(tower.features))
    ]


def _answer_costs(
    checkpoint: Checkpoint,
    processor: Processor,
    tower: VisionReference,
    kept: Sequence[Sequence[NDArray[np.int64]]],
    settings: ChoiceSettings,
    progress: Progress,
) -> list[list[Cost]]:
    """For each image and set of kept tokens the mean cost over the questions."""
    eos_token_ids = GenerationDefaults.of(checkpoint, processor.tokenizer).eos_token_ids
    criterion = AnswerCriterion(checkpoint, eos_token_ids, settings.max_answer_tokens)
    token_ids = [processor.question_ids(question) for question in settings.questions]
    num_prefix_tokens = VisionShape.of(checkpoint.config).num_prefix_tokens
    prompts = [criterion.prompt(ids, image, num_prefix_tokens) for image in tower.embeds for ids in token_ids]
    with progress.step(f"{len(prompts)} answers of the unpruned model"):
        answers = criterion.answer(prompts, progress.update)
    # Ranges often keep the same patches, whose cost is computed once.
    distinct = [{sets.tobytes(): sets for sets in of_image} for of_image in kept]
    asked = [list(sets.values()) for sets in distinct for _ in token_ids]
    with progress.step(f"The same answers after {sum(map(len, asked))} sets of kept tokens"):
        found = iter(criterion.costs(prompts, answers, asked, progress.update))
    costs = []
    for of_image, sets in zip(kept, distinct, strict=True):
        by_question = [dict(zip(sets, next(found), strict=True)) for _ in token_ids]
        costs.append([_mean([by_set[indices.tobytes()] for by_set in by_question]) for indices in of_image])
    return costs


def _mean(costs: Sequence[Cost]) -> Cost:
    agreements = [cost.agreement for cost in costs if cost.agreement is not None]
    return Cost(float(np.mean([cost.value for cost in costs])), float(np.mean(agreements)) if agreements else None)


def _layer_score(costs: Sequence[Cost]) -> LayerScore:
    return LayerScore(tuple(cost.value for cost in costs), _mean(costs).agreement)
