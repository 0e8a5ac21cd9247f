from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, SamplingParams
from hivtp.engines.bundle import Bundle
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.layers.choice import _kept_sets, _run_tower, choose_layers, layer_ranges
from hivtp.export.layers.ranking import ChoiceSettings, LayerRange
from hivtp.export.settings import ExportSettings
from hivtp.main import export, main
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.inputs.templating.renderer import TemplateFailedError
from hivtp_ops import PruningSpec
from hivtp_ops.errors import ImageError, SpecError

if TYPE_CHECKING:
    from pathlib import Path

FEATURES = ChoiceSettings("features")
RULE = ExportSettings(preset="192")


@pytest.fixture(scope="module")
def images(photos: Path) -> list[Path]:
    return [photos / name for name in ("astronaut.png", "coffee.png", "chelsea.png")]


def test_ranges_are_those_that_the_spec_leaves_open() -> None:
    def ranges(depth: int, **spec: int) -> list[tuple[int, int]]:
        found = layer_ranges(depth, PruningSpec(**spec))
        return sorted((layers.first_layer, layers.num_layers) for layers in found)

    assert ranges(3) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    assert len(ranges(23)) == 23 + 22 + 21
    assert ranges(5, num_layers=4) == [(0, 4), (1, 4)]
    assert ranges(5, first_layer=3) == [(3, 1), (3, 2)]
    assert ranges(5, first_layer=3, num_layers=2) == [(3, 2)]
    with pytest.raises(SpecError, match="first_layer is 3, num_layers 3, and the features come from the first 5"):
        layer_ranges(5, PruningSpec(first_layer=3, num_layers=3))


def test_a_range_keeps_what_a_bundle_exported_with_it_keeps(
    tiny_checkpoint: Path, pruned_bundle: Path, images: list[Path]
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    loaded = [load_image(image) for image in images]
    tower = _run_tower(checkpoint, Processor.open(checkpoint), loaded, 5, lambda *_: None)
    spec = Bundle.open(pruned_bundle).manifest.pruning
    layers = LayerRange(spec.first_layer, spec.num_layers)
    kept = _kept_sets(tower, (8, 8), spec, [LayerRange(0, 3), layers])
    with Pipeline.load(pruned_bundle) as pipeline:
        for image, (_, expected, random) in zip(images, kept, strict=True):
            found = pipeline.generate("what", [image], SamplingParams(max_new_tokens=1)).kept_indices
            assert found == [expected.tolist()]
            assert random.tolist() != expected.tolist()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_ranges_are_ordered_by_cost(tiny_checkpoint: Path, tmp_path: Path, images: list[Path], family: str) -> None:
    folder = tiny_checkpoint if family == "llava" else make_checkpoint(tmp_path / "next", family=family)
    settings = ChoiceSettings(questions=("what", "how many dogs"), max_answer_tokens=3)
    ranking = choose_layers(folder, images[:2], RULE, settings, is_quiet=True)
    assert len(ranking.ranges) == 5 + 4 + 3
    costs = [score.cost for _, score in ranking.ranges]
    assert costs == sorted(costs)
    assert ranking.best == ranking.ranges[0][0]
    assert ranking.default == LayerRange(2, 1)
    assert all(len(score.costs) == 2 for _, score in ranking.ranges)
    assert all(0 <= score.agreement <= 1 for _, score in [*ranking.ranges, (None, ranking.random)])


def test_a_cost_is_the_mean_over_the_questions(tiny_checkpoint: Path, images: list[Path]) -> None:
    export = ExportSettings(preset="192", first_layer=2)

    def costs(*questions: str) -> dict[LayerRange, float]:
        settings = ChoiceSettings(questions=questions, max_answer_tokens=3)
        ranking = choose_layers(tiny_checkpoint, images[:1], export, settings, is_quiet=True)
        return {layers: score.cost for layers, score in ranking.ranges}

    first, second, both = costs("what"), costs("how many dogs"), costs("what", "how many dogs")
    assert both == pytest.approx({layers: (first[layers] + second[layers]) / 2 for layers in both}, rel=1e-4)


def test_the_features_need_no_language_model(
    tiny_checkpoint: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    ranking = choose_layers(tiny_checkpoint, images, RULE, FEATURES, is_quiet=True)
    assert read
    assert not [name for name in read if name.startswith("language.")]
    assert {score.agreement for _, score in ranking.ranges} == {None}


def test_keeping_everything_makes_no_range_better(tiny_checkpoint: Path, images: list[Path]) -> None:
    export = ExportSettings(spec=PruningSpec(keep=64))
    ranking = choose_layers(tiny_checkpoint, images, export, FEATURES, is_quiet=True)
    assert {score.cost for _, score in ranking.ranges} == {0.0}
    assert not ranking.is_significant
    assert "this ranking says nothing about the layers" in ranking.table()


def test_the_command_prints_a_table_and_what_to_export_with(
    tiny_checkpoint: Path, tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "192", "--quiet", "--max-answer-tokens", "2", "--question", "what"]
    command = ["layers", str(tiny_checkpoint), *map(str, images), *options]
    assert main(command) == 0
    table, errors = capsys.readouterr()
    assert errors == ""
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, count = found["recommended"]["first_layer"], found["recommended"]["num_layers"]
    assert found["ranges"][0] | found["recommended"] == found["ranges"][0]
    assert (found["num_images"], found["questions"], found["max_answer_tokens"]) == (3, ["what"], 2)
    assert found["pruning"]["keep"] == 21
    lines = table.splitlines()
    assert lines[0].split() == ["layers", "divergence", "+-", "same", "token"]
    assert lines[1].split()[:2] == [str(LayerRange(first, count)), f"{found['ranges'][0]['cost']:.4f}"]
    assert np.mean(found["ranges"][0]["costs"]) == pytest.approx(found["ranges"][0]["cost"])
    assert sum("the default" in line for line in lines if line[0:1].isdigit()) == 1
    assert lines[13].startswith("random scores")

    # What it recommends is what the export takes, beside the same preset.
    [advice] = [line for line in lines if line.startswith("export with: ")]
    options = advice.removeprefix("export with: ").split()
    bundle = tmp_path / "bundle"
    assert export([str(tiny_checkpoint), str(bundle), "--preset", "192", "--quiet", *options]) == 0
    spec = Bundle.open(bundle).manifest.pruning
    assert (spec.first_layer, spec.num_layers, spec.keep) == (first, count, 21)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--no-pruning"], "without pruning no layer scores patches"),
        (["no-such.png"], "there is no image file 'no-such.png'"),
        (["{photo}", "--first-layer", "5"], "no range of layers is left"),
        (["a.png", "--criterion", "features", "--question", "what"], "the criterion features asks no questions"),
        (["a.png", "--question", " "], "a question is empty"),
        (["a.png", "--max-answer-tokens", "0"], "max_answer_tokens must be 1 or more, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tiny_checkpoint: Path, photo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [argument.format(photo=photo) for argument in arguments]
    assert main(["layers", str(tiny_checkpoint), "--quiet", *arguments]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert message in errors
    assert errors.count("\n") == 1


def test_the_export_ranks_layers_too(
    tiny_checkpoint: Path, tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(tiny_checkpoint), "--quiet", "--preset", "192", "--choose-layers", str(images[0])]) == 0
    assert "export with: --first-layer " in capsys.readouterr().out
    assert export([str(tiny_checkpoint), str(tmp_path / "bundle"), "--choose-layers", str(images[0])]) == 1
    assert "--choose-layers writes nothing: leave the bundle and --engine out" in capsys.readouterr().err
    assert export([str(tiny_checkpoint)]) == 1
    assert "no bundle was named" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_read_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"broken\.png'?: not an image, or a damaged one"):
        choose_layers(tiny_checkpoint, [tmp_path / "broken.png"], RULE, FEATURES, is_quiet=True)
    with pytest.raises(ImageError, match="no images were given"):
        choose_layers(tiny_checkpoint, [], RULE, FEATURES, is_quiet=True)


def test_a_tile_budget_is_refused(tmp_path: Path, images: list[Path]) -> None:
    folder = make_checkpoint(tmp_path / "next", family="llava_next")
    with pytest.raises(SpecError, match="give the tokens of a tile with keep, not keep_total"):
        choose_layers(folder, images, ExportSettings(keep_total=30), FEATURES, is_quiet=True)


def test_a_template_that_loses_the_question_is_refused(tiny_checkpoint: Path) -> None:
    processor = Processor.open(Checkpoint.open(tiny_checkpoint))
    assert processor.question_ids("what is this").count(511) == 1
    processor.prompt["chat_template"] = "USER: <image>"
    with pytest.raises(TemplateFailedError, match="loses words or an image"):
        processor.question_ids("what is this")
    processor.prompt["chat_template"] = None
    assert processor.question_ids("what").count(511) == 1
