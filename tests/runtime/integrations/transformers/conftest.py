from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from tests.support.family import Family, make_family

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llava") / "checkpoint", LlavaForConditionalGeneration)


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("next") / "checkpoint", LlavaNextForConditionalGeneration)


@pytest.fixture(scope="session", params=[LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def siglip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With a SigLIP tower and a Qwen2, with and without tiles."""
    folder = tmp_path_factory.mktemp("siglip") / "checkpoint"
    return make_family(folder, request.param, tower="siglip", language="qwen2")


@pytest.fixture(scope="session")
def shared_model(llava: Family) -> Any:
    return llava.load()


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """The LLaVA-1.5 under test, which every test must leave as it was."""
    yield shared_model
    assert "generate" not in vars(shared_model)
    assert not shared_model._forward_pre_hooks


@pytest.fixture(scope="session")
def next_model(llava_next: Family) -> Any:
    return llava_next.load()
