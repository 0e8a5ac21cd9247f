from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hivtp.engines.base import EngineSettings
from hivtp.runtime.vision.options import VisionOptions
from hivtp_ops.errors import SettingsError


@pytest.mark.parametrize(
    ("name", "minimum", "values"),
    [
        # An image has a base tile, and at least one more.
        ("max_tiles", 2, [1, 0, -1, True, 2.5, "5", None]),
        ("max_tiles_per_run", 1, [0, -1, True, 2.5, "5", None]),
        ("cache_bytes", 0, [-1, 1.5, True, "10", None]),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name: str, minimum: int, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=f"^{name} must be a whole number, {minimum} or more, not {value!r}$"):
            VisionOptions(**{name: value})
    VisionOptions(**{name: minimum})


@pytest.mark.parametrize("engine", ["torch", "cuda", "", None, 3])
def test_an_engine_that_does_not_exist_is_refused_with_those_that_do(engine: Any) -> None:
    with pytest.raises(
        SettingsError, match=r"no vision engine is named .*; there are auto, onnxruntime, .*transformers"
    ):
        VisionOptions(engine=engine)


@pytest.mark.parametrize("num_threads", [0, -1, 513, 99999, True, 1.0, "4"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(num_threads: Any) -> None:
    with pytest.raises(SettingsError, match=f"num_threads must be a whole number from 1 to 512, not {num_threads!r}"):
        VisionOptions(num_threads=num_threads)


@pytest.mark.parametrize("uses_cuda_graph", [1, "yes", None])
def test_a_flag_that_is_neither_true_nor_false_is_refused(uses_cuda_graph: Any) -> None:
    with pytest.raises(SettingsError, match="uses_cuda_graph must be True or False"):
        VisionOptions(uses_cuda_graph=uses_cuda_graph)


def test_options_are_values_with_the_settings_of_the_engine() -> None:
    assert VisionOptions() == VisionOptions(engine="auto")
    assert VisionOptions(num_threads=3, uses_cuda_graph=True).engine_settings == EngineSettings(3, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        VisionOptions().max_tiles = 3  # type: ignore[misc]
