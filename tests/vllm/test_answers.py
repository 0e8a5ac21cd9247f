"""What vLLM answers with the plugin is what transformers answers when `prune` has pruned it by the same rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.family import NUM_NEW
from tests.vllm.conftest import engine_settings
from tests.vllm.reference import RULES, expected, prompts

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_tokens_are_those_of_prune_in_transformers(name, request, run_engine):
    family, rule = request.getfixturevalue(name), RULES[name]
    asked = [prompt.for_vllm for prompt in prompts()]
    tokens, lengths = expected(family, rule, prompts())
    assert len({tuple(answer) for answer in tokens}) == len(tokens)

    one_by_one = run_engine(engine_settings(family.folder, rule), [[prompt] for prompt in asked], NUM_NEW)
    # Prompts in chunks, and what comes twice is found in the prefix cache.
    settings = engine_settings(family.folder, rule, max_num_batched_tokens=48, max_num_seqs=8, block_size=32)
    together = run_engine(settings, [asked, asked], NUM_NEW)
    for answers in ([answer for [answer] in one_by_one], *together):
        assert [answer["tokens"] for answer in answers] == tokens
        assert [answer["num_prompt_tokens"] for answer in answers] == lengths
    assert sum(answer["num_cached_tokens"] for answer in together[1]) > 0


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_without_pruning_nothing_changes(name, request, run_engine):
    """The plugin's architecture that keeps every token answers as transformers, as vLLM's own does."""
    family, some = request.getfixturevalue(name), prompts()[::3]
    tokens, lengths = expected(family, None, some)
    batch = [prompt.for_vllm for prompt in some]
    for pruning in ({"preset": "none"}, None):
        [answers] = run_engine(engine_settings(family.folder, pruning), [batch], NUM_NEW)
        assert [answer["tokens"] for answer in answers] == tokens
        assert [answer["num_prompt_tokens"] for answer in answers] == lengths


def test_embeddings_of_several_lengths_in_one_run_do_not_end_the_engine(llava, run_engine):
    """vLLM's own LLaVA makes one tensor of them, and ends when it cannot."""
    rng = np.random.default_rng(3)
    images = [torch.from_numpy(rng.standard_normal((length, 128), np.float32)) for length in (5, 21, 33, 64, 21)]
    prompts = [
        {"prompt": "USER: <image>\nwhat is this? ASSISTANT:", "multi_modal_data": {"image": [image]}}
        for image in images
    ]
    pair = {"prompt": "USER: <image> <image>\nwhat? ASSISTANT:", "multi_modal_data": {"image": images[:2]}}
    [together, *alone] = run_engine(
        engine_settings(llava.folder, RULES["llava"]), [[*prompts, pair], *([prompt] for prompt in [*prompts, pair])]
    )
    assert [answer["tokens"] for answer in together] == [answer["tokens"] for [answer] in alone]
    lengths = [answer["num_prompt_tokens"] for answer in together]
    assert [length - lengths[0] for length in lengths[1:5]] == [16, 28, 59, 16]
