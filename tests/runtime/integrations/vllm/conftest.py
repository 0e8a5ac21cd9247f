from __future__ import annotations

from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from tests.support.family import Family, make_family


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llava") / "checkpoint", LlavaForConditionalGeneration)


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("next") / "checkpoint", LlavaNextForConditionalGeneration)


@pytest.fixture(scope="session")
def next_model(llava_next: Family) -> Any:
    return llava_next.load()
