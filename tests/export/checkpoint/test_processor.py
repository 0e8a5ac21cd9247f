from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.original import JSON_FILES
from hivtp.export.checkpoint.processor import Processor
from hivtp_ops.errors import CheckpointError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path


def open_processor(folder: Path) -> Processor:
    return Processor.open(Checkpoint.open(folder))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "3", "[{}]"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_no_object_is_refused(broken: Path, name: str, content: str) -> None:
    (broken / name).write_text(content)
    with pytest.raises(
        CheckpointError, match=rf"{name} (cannot be read: it is not valid JSON|holds a JSON \w+, expected an obj)"
    ):
        open_processor(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_does_not_block(broken: Path, name: str) -> None:
    (broken / name).unlink()
    os.mkfifo(broken / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a regular file"):
        open_processor(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_missing_part_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_processor(broken)


EVIL = "open({flag!r}, 'w').close()\n\n\nclass Evil:\n    pass\n"


@pytest.mark.parametrize(
    ("name", "keys", "is_refused"),
    [
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}, True),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Evil"}}, False),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, False),
    ],
)
def test_code_of_a_checkpoint_is_never_run_and_nothing_is_asked(
    broken: Path, tmp_path: Path, name: str, keys: dict, is_refused: bool
) -> None:
    edit_json(broken / name, **keys)
    flag = tmp_path / "ran"
    (broken / "evil.py").write_text(EVIL.format(flag=str(flag)))
    script = (
        "import sys\nfrom hivtp.export.checkpoint.folder import Checkpoint\n"
        "from hivtp.export.checkpoint.processor import Processor\nfrom hivtp_ops.errors import HivtpError\n"
        "try:\n    Processor.open(Checkpoint.open(sys.argv[1]))\nexcept HivtpError as error:\n    print(error)\n"
    )
    # Whoever is asked says yes.
    process = subprocess.run(
        [sys.executable, "-c", script, str(broken)],
        input="y\n" * 5,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not flag.exists()
    assert "[y/N]" not in process.stdout + process.stderr
    assert ("is Python code of the checkpoint, which is never run" in process.stdout) == is_refused


def test_the_question_of_a_chosen_layer_is_the_runtimes_prompt(tiny_checkpoint: Path) -> None:
    processor = open_processor(tiny_checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What is red?"}]
    text = processor.original.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert processor.question_ids("What is red?") == processor.tokenizer(text)["input_ids"]
