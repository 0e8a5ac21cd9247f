"""The examples of README and docs run as they stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.miniature.pictures import HELD_OUT, draw
from hivtp import Pipeline
from hivtp_ops import PRESETS, PruningSpec
from tests.support.command import shell
from tests.support.documents import DOCUMENTS, README, blocks, shell_lines
from tests.support.serving import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXAMPLES = [(name, block) for name, text in DOCUMENTS.items() for block in blocks(text, "python")]
# Those of the README that run here. Of the others, `plan` needs a GPU, and `serve` is asked below.
SHELL = [line for line in shell_lines(README) if line.startswith("hivtp ") and "plan" not in line.split()]


@pytest.fixture
def folder(tmp_path: Path, photo: Path, tiny_checkpoint: Path) -> Path:
    """A folder with the files that the examples name. Its checkpoint is tiny, and lies where the hub's would."""
    folder = tmp_path / "readme"
    folder.mkdir()
    for name in ("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"):
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tiny_checkpoint)
    Image.open(photo).convert("RGB").save(folder / "photo.jpg")
    return folder


@pytest.fixture
def workplace(folder: Path, pruned_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder, with a bundle in it."""
    (folder / "bundle").symlink_to(pruned_bundle)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def names(photo: Path, tiny_checkpoint: Path) -> Mapping[str, object]:
    """What an example may take for granted: a loaded model and its inputs."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    image, text = Image.open(photo).convert("RGB"), "USER: <image>\nwhat ASSISTANT:"
    return {"model": model, "inputs": processor(images=image, text=text, return_tensors="pt")}


@pytest.mark.parametrize(("document", "example"), EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_an_example_in_python_runs(
    document: str, example: str, workplace: Path, names: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workplace == Path.cwd()
    if "8000" in example:
        pytest.skip("the next test runs what asks a server")
    if "prune(model" in example:
        # The example's model has 24 x 24 patches, this one 8 x 8.
        monkeypatch.setattr(PruningSpec, "preset", small_presets(PruningSpec.preset))
    exec(compile(example, document, "exec"), dict(names))


@pytest.mark.parametrize(
    ("document", "example"),
    [pair for pair in EXAMPLES if "8000" in pair[1]],
    ids=lambda text: text.splitlines()[0],
)
def test_an_example_that_asks_a_server_runs(document: str, example: str, pruned_bundle: Path) -> None:
    for package in ("openai", "langchain_openai"):
        if f"from {package} " in example:
            # Of LangChain there is a test in tests/clients, which has an environment of its own.
            pytest.importorskip(package)
    with Pipeline.load(pruned_bundle) as pipeline, serving(pipeline.model) as server:
        names: dict[str, Any] = {}
        exec(compile(example.replace("8000", str(server.port)), document, "exec"), names)
        if "stream" in names:
            assert [chunk.usage for chunk in names["stream"]][-1].completion_tokens > 0


def small_presets(preset: Callable[..., PruningSpec]) -> Callable[[str], PruningSpec]:
    return lambda name: preset(name, (8, 8))


def test_the_commands_of_the_readme_run_one_after_the_other(folder: Path) -> None:
    uses = [line.split()[1] for line in SHELL]
    assert {"export", "run", "chat", "compare"} <= set(uses)
    for line in SHELL:
        done = shell(f'cd "$1" && {line}', folder, seconds=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert Image.open(folder / "kept.png").format == "PNG"


def test_the_server_answers_as_the_readme_says(miniature_bundle: Path, tmp_path: Path) -> None:
    (curl,) = (block for block in blocks(README, "sh") if block.startswith("curl"))
    (expected,) = blocks(README, "json")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "demo").mkdir()
    draw(HELD_OUT[0]).image.save(tmp_path / "demo" / "picture-1.png")
    with Pipeline.load(miniature_bundle) as pipeline, serving(pipeline.model) as server:
        port = str(server.port)
        assert curl.count("8000") == 1
        done = shell(f'cd "$1" && {curl.replace("8000", port)}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert comparable(done.stdout) == comparable(expected)


def comparable(reply: str) -> Any:
    """A reply without what differs from one to the next."""
    found = json.loads(reply)
    assert found.pop("id").startswith("chatcmpl-")
    assert isinstance(found.pop("created"), int)
    return found


def test_every_preset_is_documented() -> None:
    for name in PRESETS:
        assert f"\n| `{name}`" in README, name
