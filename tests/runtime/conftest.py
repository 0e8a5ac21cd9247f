from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hivtp.runtime.inputs.messages import Message
from tests.support.answers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp import Pipeline


@pytest.fixture(scope="session")
def unpruned(unpruned_bundle: Path) -> Pipeline:
    return load(unpruned_bundle)


@pytest.fixture(scope="session")
def pruned(pruned_bundle: Path) -> Pipeline:
    return load(pruned_bundle)


@pytest.fixture(scope="session")
def pipelines(unpruned: Pipeline, pruned: Pipeline, exact_bundle: Path, varying_bundle: Path) -> dict[str, Pipeline]:
    return {"unpruned": unpruned, "pruned": pruned, "exact": load(exact_bundle), "varying": load(varying_bundle)}


@pytest.fixture(scope="session")
def prompt_of(unpruned: Pipeline) -> Callable[[int], str]:
    """Gives a text prompt that the template and the tokenizer make this many tokens long."""
    tokenizer = unpruned.model.tokenizer
    shortest = len(tokenizer.encode(unpruned.model.template.render([Message("user", ["a"])], tokenizer)))
    return lambda num_tokens: "a" + " a" * (num_tokens - shortest)
