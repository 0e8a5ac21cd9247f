from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from benchmarks.timing.large_checkpoint import write_large_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def test_the_seed_alone_decides_the_weights_and_no_two_are_alike(tmp_path: Path) -> None:
    whole = weights(write_large_checkpoint(tmp_path / "a", "tiny", dtype="float16"))
    # Other shards, and other threads that draw them.
    again = weights(write_large_checkpoint(tmp_path / "b", "tiny", dtype="float16", max_shard_bytes=50_000))
    other = weights(write_large_checkpoint(tmp_path / "c", "tiny", dtype="float16", seed=1000))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert whole.keys() == again.keys() == other.keys()
    assert all(weight.dtype == torch.float16 and torch.equal(weight, again[name]) for name, weight in whole.items())
    drawn = [weight.flatten()[:40].tolist() for name, weight in whole.items() if "norm" not in name]
    assert len({tuple(values) for values in drawn}) == len(drawn)
    name = "language_model.lm_head.weight"
    assert not torch.equal(whole[name], other[name])


def test_transformers_loads_it_with_as_many_layers_as_are_asked_for(tmp_path: Path) -> None:
    from transformers import LlavaNextForConditionalGeneration

    folder = write_large_checkpoint(tmp_path / "a", "tiny", family="llava_next", text={"num_hidden_layers": 1})
    model, loading = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert len(model.model.language_model.layers) == 1
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
