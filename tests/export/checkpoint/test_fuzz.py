"""Files of a checkpoint with a value exchanged for an odd one: opened, or refused by an error of hivtp."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.checkpoints import make_checkpoint
from benchmarks.published.writer import make_published
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.generation import GenerationDefaults
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.decoder.support import check_decoder
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 8.0
FILES = (
    "config.json",
    "config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "model.safetensors.index.json",
)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**6,
    10**12,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "a\0b",
    "\ud800",
    "silu",
    "{{ 7 * 7 }}",
    "<image>",
    "y" * 10_000,
    [],
    [[]],
    [None],
    {},
    {"a": {"b": []}},
    [0] * 100,
    {"rope_type": "yarn"},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = list(value.items())[:200]
    elif isinstance(value, list):
        inner = list(enumerate(value))[:50]
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(content: Any, draw: random.Random) -> Any:
    """A value of it exchanged, dropped, or one more added."""
    content = json.loads(json.dumps(content))
    path = draw.choice(places(content))
    if not path:
        return draw.choice(ODD)
    *above, key = path
    holder = content
    for step in above:
        holder = holder[step]
    action = draw.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.25 and isinstance(holder, dict):
        holder[draw.choice(("quantization_config", "text_config", "auto_map", "size", "dtype", "x"))] = draw.choice(ODD)
    else:
        holder[key] = draw.choice(ODD)
    return content


def open_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    check_decoder(checkpoint)
    processor = Processor.open(checkpoint)
    GenerationDefaults.of(checkpoint, processor.tokenizer)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_odd_value_anywhere_is_refused_or_of_no_matter(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "checkpoint"
    if seed % 2:
        make_published(folder, "llava-hf/llava-v1.6-vicuna-7b-hf")
    else:
        make_checkpoint(folder, max_shard_size="200KB")
    original = shutil.copytree(folder, tmp_path / "original")
    draw, started, refused, opened = random.Random(seed), time.monotonic(), 0, 0
    while time.monotonic() - started < SECONDS:
        file = folder / draw.choice(FILES)
        if not file.exists():
            continue
        content = mutated(json.loads(file.read_text()), draw)
        file.write_text(json.dumps(content), errors="surrogatepass")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                open_all(folder)
            opened += 1
        except HivtpError as error:
            refused += bool(str(error))
        except BaseException as error:
            raise AssertionError(f"{file.name}: {json.dumps(content)[:2000]}") from error
        shutil.copy(original / file.name, file)
    # Neither is everything refused nor nothing.
    assert refused > 3
    assert opened > 3
