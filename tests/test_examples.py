"""The scripts of examples/ run as a user runs them, and give the answers that are known to be right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.miniature.model import CHECKPOINT
from benchmarks.miniature.pictures import HELD_OUT, draw
from hivtp import Pipeline
from tests.support.serving import serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.miniature.pictures import Question
    from tests.support.serving import Server

EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_PICTURES = 2
COUNT = "How many shapes are there?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Sequence[Question]]]:
    """Picture files, and questions about each with the right answers."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = []
    for number, seed in enumerate(HELD_OUT[:NUM_PICTURES]):
        picture, file = draw(seed), folder / f"{number}.png"
        picture.image.save(file)
        drawn.append((file, picture.questions))
    return drawn


@pytest.fixture(scope="module")
def server(miniature_bundle: Path) -> Iterator[Server]:
    with Pipeline.load(miniature_bundle) as pipeline, serving(pipeline.model) as running:
        yield running


def run_example(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def right_answer(questions: Sequence[Question], text: str = COUNT) -> str:
    [answer] = [question.answer for question in questions if question.text == text]
    return answer


def test_answer(miniature_bundle: Path, pictures: list[tuple[Path, Sequence[Question]]]) -> None:
    for file, questions in pictures:
        answer, tokens, *_ = run_example("answer.py", miniature_bundle, file, COUNT)
        assert answer == right_answer(questions)
        assert tokens.startswith("72 of 144 visual tokens were kept")


def test_batch(miniature_bundle: Path, pictures: list[tuple[Path, Sequence[Question]]], tmp_path: Path) -> None:
    files = [file for file, _ in pictures]
    missing = tmp_path / "missing.png"
    *answers, failed = run_example("batch.py", miniature_bundle, COUNT, *files, missing)
    assert answers == [f"{file}: {right_answer(questions)}" for file, questions in pictures]
    assert failed.startswith(f"{missing}: failed: there is no image file")


def test_chat_with_image(miniature_bundle: Path, pictures: list[tuple[Path, Sequence[Question]]]) -> None:
    [(file, questions), *_] = pictures
    texts = [question.text for question in questions[:3]]
    lines = run_example("chat_with_image.py", miniature_bundle, file, *texts)
    expected = [f"{text} {right_answer(questions, text)} (" for text in texts]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_openai_client(server: Server, pictures: list[tuple[Path, Sequence[Question]]]) -> None:
    [(file, questions), *_] = pictures
    lines = run_example("openai_client.py", f"{server.url}/v1", file, COUNT)
    assert lines == [right_answer(questions), "72 visual tokens were kept."]


def test_prune_in_transformers(pictures: list[tuple[Path, Sequence[Question]]]) -> None:
    [(file, questions), *_] = pictures
    text = next(question.text for question in questions if question.text.startswith("Which shape"))
    unpruned, pruned = run_example("prune_in_transformers.py", CHECKPOINT, file, text)
    assert unpruned == f"unpruned: {right_answer(questions, text)}"
    assert pruned.startswith("pruned: ")


def test_every_example_is_short_and_tested() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert len(names) == 5
    assert {f"test_{name}" for name in names} <= set(globals())
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 40, file
