"""The real lmms-eval on a small local task; runs where lmms-eval is installed beside hivtp."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.support.answers import at_most

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp import Pipeline

IS_INSTALLED = importlib.util.find_spec("lmms_eval") is not None and bool(
    importlib.metadata.entry_points(group="lmms_eval.models", name="hivtp")
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_INSTALLED, reason="needs lmms-eval and an installed hivtp")]

QUESTIONS = ["is there a dog", "is the picture red", "is there a house", "is there a tree"]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
task: {task}
"""
TASKS = {
    "pictures_yes_no": """
output_type: generate_until
doc_to_target: "{{answer}}"
doc_to_visual: !function functions.picture
generation_kwargs:
  max_new_tokens: 5
  temperature: 0
  num_beams: 1
  do_sample: false
process_results: !function functions.process
metric_list:
  - metric: is_right
    aggregation: !function functions.mean
    higher_is_better: true
""",
    "pictures_pairs": """
output_type: generate_until
doc_to_target: "{{answer}}"
doc_to_visual: !function functions.pair
generation_kwargs:
  max_new_tokens: 4
  until: ["a"]
process_results: !function functions.process
metric_list:
  - metric: is_right
    aggregation: !function functions.mean
    higher_is_better: true
""",
    "pictures_none": """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  max_new_tokens: 4
process_results: !function functions.process
metric_list:
  - metric: is_right
    aggregation: !function functions.mean
    higher_is_better: true
""",
    "pictures_choice": """
output_type: multiple_choice
doc_to_visual: !function functions.picture
doc_to_choice: ["no", "yes"]
doc_to_target: "yes"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
}
FUNCTIONS = """
from PIL import Image

def picture(doc):
    return [Image.open(doc["picture"])]

def pair(doc):
    return [Image.open(doc["picture"]), Image.open(doc["other"])]

def process(doc, results):
    return {"is_right": float(results[0].strip() == doc["answer"])}

def mean(values):
    return sum(values) / len(values)
"""


@pytest.fixture(scope="module")
def documents(pruned: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Four questions about four pictures; to the first two the right answer is what the bundle says."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(4)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((80, 64)).save(file)
    said = [pruned.generate(QUESTIONS[index], [files[index]], at_most(5)).text.strip() for index in range(2)]
    return [
        {"question": question, "answer": answer, "picture": str(file), "other": str(files[0])}
        for question, answer, file in zip(QUESTIONS, [*said, "yes", "yes"], files, strict=True)
    ]


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "functions.py").write_text(FUNCTIONS)
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for task, text in TASKS.items():
        (folder / f"{task}.yaml").write_text(COMMON.format(data=data, task=task) + text)
    return folder


def evaluate(tasks: Path, home: Path, names: str, model_args: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "hivtp", "--model_args", model_args, "--tasks", names]
    command += ["--include_path", str(tasks), "--log_samples", "--output_path", str(home / "out"), *options]
    offline = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, cwd=home, capture_output=True, text=True, timeout=300, check=False
    )
    print(done.stdout, done.stderr)  # noqa: T201  shown where the test fails
    return done


def samples_of(home: Path, task: str) -> list[dict[str, Any]]:
    [file] = (home / "out").rglob(f"*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def said(sample: dict[str, Any]) -> str:
    """The answer of a sample, which lmms-eval 0.6 keeps in a list."""
    answer = sample["filtered_resps"]
    return (answer if isinstance(answer, str) else answer[0]).strip()


@pytest.fixture(scope="module")
def home(pruned_bundle: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    names = "pictures_yes_no,pictures_pairs,pictures_none"
    done = evaluate(tasks, folder, names, f"bundle={pruned_bundle},batch_size=3,threads=1")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_answers_are_those_of_the_bundle(home: Path, documents: list[dict[str, str]], pruned: Pipeline) -> None:
    for sample, document in zip(samples_of(home, "pictures_yes_no"), documents, strict=True):
        alone = pruned.generate(document["question"], [document["picture"]], at_most(5))
        assert said(sample) == alone.text.strip()


def test_the_score_counts_them(home: Path) -> None:
    [file] = (home / "out").rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    assert results["pictures_yes_no"]["is_right,none"] == 0.5


def test_several_pictures_come_in_their_order_and_until_cuts(
    home: Path, documents: list[dict[str, str]], pruned: Pipeline
) -> None:
    for sample, document in zip(samples_of(home, "pictures_pairs"), documents, strict=True):
        prompt, images = f"<image> <image>\n{document['question']}", [document["picture"], document["other"]]
        alone = pruned.generate(prompt, images, at_most(4))
        assert said(sample) == alone.text.lstrip().partition("a")[0].strip()


def test_a_request_without_a_picture_is_answered(home: Path, documents: list[dict[str, str]], pruned: Pipeline) -> None:
    for sample, document in zip(samples_of(home, "pictures_none"), documents, strict=True):
        assert said(sample) == pruned.generate(document["question"], (), at_most(4)).text.strip()


def test_a_multiple_choice_is_judged_by_likelihood(pruned_bundle: Path, tasks: Path, tmp_path: Path) -> None:
    instance = pytest.importorskip("lmms_eval.api.instance")
    unwrap = getattr(instance, "unwrap_generation_output", None)
    if unwrap is not None and isinstance(unwrap((1.5, True))[0], str):
        pytest.skip("this lmms-eval turns every likelihood into text, and its multiple-choice tasks fail")
    done = evaluate(tasks, tmp_path, "pictures_choice", f"bundle={pruned_bundle},threads=1", "--batch_size", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    samples = samples_of(tmp_path, "pictures_choice")
    assert len(samples) == 4
    for sample in samples:
        [[no], [yes]] = sample["resps"]
        losses = float(no[0]), float(yes[0])
        assert min(losses) > 0
        assert sample["acc"] == float(losses[1] < losses[0])


@pytest.mark.parametrize(
    ("model_args", "options", "message"),
    [
        ("bundle=no-such-folder", [], "no-such-folder"),
        ("bundle={bundle}", ["--device", "cuda"], "a bundle is run on the CPU"),
        ("bundle={bundle}", ["--batch_size", "auto"], "batch_size must be a number, not 'auto'"),
    ],
)
def test_what_cannot_work_is_refused(
    pruned_bundle: Path, tasks: Path, tmp_path: Path, model_args: str, options: list[str], message: str
) -> None:
    done = evaluate(tasks, tmp_path, "pictures_yes_no", model_args.format(bundle=pruned_bundle), *options)
    assert message in done.stdout + done.stderr
    assert not list((tmp_path).rglob("*_samples_*"))
