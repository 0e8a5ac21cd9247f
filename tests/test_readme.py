"""The examples of the README run as they stand, and its links and options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hivtp.export.cli.export import make_parser as export_parser
from hivtp.export.cli.plan import make_engine_parser
from hivtp.runtime.cli.run import make_parser as run_parser
from hivtp_ops import PRESETS, PruningSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(
    tmp_path: Path, photo: Path, tiny_checkpoint: Path, pruned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the files that the examples name."""
    (tmp_path / "llava-1.5-7b-hf").symlink_to(tiny_checkpoint)
    (tmp_path / "bundle").symlink_to(pruned_bundle)
    Image.open(photo).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def names(tiny_checkpoint: Path, photo: Path) -> Mapping[str, object]:
    """What an example may take for granted: a small preset's grid, a loaded model and its inputs."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    inputs = processor(
        images=Image.open(photo).convert("RGB"), text="USER: <image>\nwhat ASSISTANT:", return_tensors="pt"
    )

    class SmallPresets(PruningSpec):
        """The example's model has 24 x 24 patches, this one 8 x 8."""

        @classmethod
        def preset(cls, name: str) -> PruningSpec:
            return PruningSpec.preset(name, (8, 8))

    return {"model": model, "inputs": inputs, "PruningSpec": SmallPresets, "torch": torch}


def test_the_readme_has_an_example_of_each_use() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_an_example_runs(example: str, workplace: Path, names: Mapping[str, object]) -> None:
    assert workplace == Path.cwd()
    exec(compile(example, "README.md", "exec"), dict(names))


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_line_parses() -> None:
    commands = re.findall(r"^    (hivtp-(?:export|run) .+)$", README, re.MULTILINE)
    assert len(commands) >= 4
    parsers = {"hivtp-export": export_parser(), "hivtp-run": run_parser()}
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        if arguments[0] == "engine":
            make_engine_parser().parse_args(arguments[1:])
        else:
            parsers[program].parse_args(arguments)


def test_every_preset_is_documented() -> None:
    for name in PRESETS:
        assert re.search(rf"^\| `{name}`", README, re.MULTILINE), name
