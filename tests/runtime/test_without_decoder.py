"""A bundle without a decoder answers from its checkpoint as one with a decoder does, and from nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime import model as model_module
from hivtp.runtime.inputs.images import load_image
from hivtp.runtime.integrations.lmms_eval.evaluation import BenchmarkModel, Question
from hivtp_ops.errors import BundleError
from tests.support.answers import PHOTOS, ask, assert_same_alone, assert_same_together, at_most, load, same

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "What is in the picture?"
NUM_TOKENS = 12
# The same export, with a decoder and without one.
Pair = tuple[Pipeline, Pipeline]


def load_pair(checkpoint: Path, *bundles: Path) -> Pair:
    whole, bare = (load(bundle, backend="transformers", checkpoint=checkpoint) for bundle in bundles)
    return whole, bare


@pytest.fixture(scope="module")
def llava(tiny_checkpoint: Path, pruned_bundle: Path, bare_bundle: Path) -> Pair:
    return load_pair(tiny_checkpoint, pruned_bundle, bare_bundle)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("next")
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048}
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", language="mistral", text=text)
    settings = [ExportSettings(preset="192"), ExportSettings(preset="192", language_precision="none")]
    bundles = [
        export_bundle(checkpoint, folder / each.language_precision, each, is_quiet=True).folder for each in settings
    ]
    return load_pair(checkpoint, *bundles)


@pytest.fixture(params=["llava", "llava_next"])
def pair(request: pytest.FixtureRequest) -> Pair:
    pipelines: Pair = request.getfixturevalue(request.param)
    return pipelines


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    sizes = [(150, 60), (64, 64), (50, 130), (120, 120)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=False)]
    return [
        ask(PROMPT, [pictures[0]], NUM_TOKENS),
        ask("how many dogs", (), NUM_TOKENS),
        ask("Is <image> brighter than <image>?", pictures[1:3], NUM_TOKENS),
        ask(PROMPT, [pictures[3]], NUM_TOKENS, temperature=1.0, seed=5),
        ask(PROMPT, [pictures[0]], NUM_TOKENS),
    ]


def test_answers_are_the_same(pair: Pair, requests: list[Request]) -> None:
    """Alone, together, and one after the other."""
    assert_same_alone(*pair, requests)
    assert_same_together(*pair, requests)
    whole, bare = (list(pipeline.generate_each(requests)) for pipeline in pair)
    assert len(bare) == len(requests)
    assert all(same(first, second) for first, second in zip(whole, bare, strict=True))


def test_streams_are_the_same(pair: Pair, photo: Path) -> None:
    whole, bare = (list(pipeline.stream(PROMPT, [photo], at_most(NUM_TOKENS))) for pipeline in pair)
    assert whole == bare
    assert "".join(bare)


def test_conversations_are_the_same(pair: Pair, photo: Path) -> None:
    whole, bare = (pipeline.chat() for pipeline in pair)
    for prompt, images in [(PROMPT, [load_image(photo).resize((90, 70))]), ("how many dogs", [])]:
        first, second = (chat.ask(prompt, images, at_most(NUM_TOKENS)) for chat in (whole, bare))
        assert same(first, second)
    assert [message.text for message in whole.history] == [message.text for message in bare.history]


def test_a_benchmark_is_answered_the_same(pair: Pair, photo: Path) -> None:
    question = Question("1", "what is there", [photo], {"max_new_tokens": 4})
    choice = Question("2", "what is there", [photo], continuation=" a dog")
    whole, bare = ((list(model.write([question])), list(model.judge([choice]))) for model in map(BenchmarkModel, pair))
    assert whole == bare


def test_without_its_checkpoint_it_is_refused_before_anything_is_loaded(
    bare_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "open_vision_engine", None)
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bare_bundle)
    for part in (
        f"{bare_bundle} holds no decoder: it was exported with --language-precision none",
        "answer with LanguageOptions(\"transformers\", checkpoint=...) and the folder of 'checkpoint'",
        "or export it again with another --language-precision",
    ):
        assert part in str(caught.value)
