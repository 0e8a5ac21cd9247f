from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hivtp import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def unpruned(unpruned_bundle: Path) -> Pipeline:
    return Pipeline.load(unpruned_bundle, num_threads=1)


@pytest.fixture(scope="session")
def pruned(pruned_bundle: Path) -> Pipeline:
    return Pipeline.load(pruned_bundle, num_threads=1)


@pytest.fixture(scope="session")
def pipelines(unpruned: Pipeline, pruned: Pipeline, exact_bundle: Path, varying_bundle: Path) -> dict[str, Pipeline]:
    return {
        "unpruned": unpruned,
        "pruned": pruned,
        "exact": Pipeline.load(exact_bundle, num_threads=1),
        "varying": Pipeline.load(varying_bundle, num_threads=1),
    }


@pytest.fixture(scope="session")
def prompt_of(unpruned: Pipeline) -> Callable[[int], str]:
    """Gives a text prompt that the template and the tokenizer make so many tokens long."""
    shortest = len(unpruned.tokenizer.encode(unpruned.template.render("a", 0)))
    return lambda num_tokens: "a" + " a" * (num_tokens - shortest)
