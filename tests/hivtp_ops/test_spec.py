from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import hivtp_ops
from hivtp_ops import PRESETS, HivtpError, PruningSpec, SpecError, op, partition

GRID = (24, 24)


def test_defaults_are_the_papers():
    spec = PruningSpec().resolve(24)
    assert (spec.first_layer, spec.num_layers) == (6, 3)
    assert (spec.regions, spec.global_ratio, spec.window, spec.keep) == (2, 0.25, 2, None)


def test_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PruningSpec().window = 3


@pytest.mark.parametrize(
    "settings",
    [
        {"first_layer": -1},
        {"first_layer": True},
        {"first_layer": 6.0},
        {"num_layers": 0},
        {"num_layers": False},
        {"num_layers": 3.0},
        {"regions": 0},
        {"regions": 2.0},
        {"regions": None},
        {"window": 0},
        {"window": True},
        {"keep": 0},
        {"keep": 192.0},
        {"keep": -1},
        {"global_ratio": -0.01},
        {"global_ratio": 1.01},
        {"global_ratio": float("nan")},
        {"global_ratio": float("inf")},
        {"global_ratio": True},
        {"global_ratio": "0.25"},
        {"global_ratio": None},
    ],
)
def test_bad_setting_is_an_error_that_names_it(settings):
    with pytest.raises(SpecError, match=next(iter(settings))):
        PruningSpec(**settings)


def test_spec_error_is_a_hivtp_error_and_a_value_error():
    assert issubclass(SpecError, HivtpError)
    assert issubclass(SpecError, ValueError)


@pytest.mark.parametrize(
    ("depth", "layers"), [(24, (6, 3)), (12, (3, 2)), (27, (7, 3)), (32, (8, 4)), (4, (1, 1)), (1, (0, 1))]
)
def test_layers_scale_with_the_encoders_depth(depth, layers):
    spec = PruningSpec().resolve(depth)
    assert (spec.first_layer, spec.num_layers) == layers


@pytest.mark.parametrize("depth", range(1, 60))
def test_scaled_layers_always_lie_inside_the_encoder(depth):
    spec = PruningSpec().resolve(depth)
    assert spec.first_layer + spec.num_layers <= depth


def test_resolve_keeps_the_layers_that_are_given():
    spec = PruningSpec(first_layer=10, num_layers=2, window=3)
    assert spec.resolve(12) == spec
    assert PruningSpec(first_layer=10).resolve(24) == PruningSpec(first_layer=10, num_layers=3)
    assert PruningSpec(num_layers=5).resolve(24) == PruningSpec(first_layer=6, num_layers=5)


@pytest.mark.parametrize("spec", [PruningSpec(23, 3), PruningSpec(24, 1), PruningSpec(0, 25), PruningSpec(23)])
def test_layers_outside_the_encoder_are_an_error(spec):
    with pytest.raises(SpecError, match="outside the encoder"):
        spec.resolve(24)


@pytest.mark.parametrize("depth", [0, -1, 24.0, True, None])
def test_an_encoder_without_layers_is_an_error(depth):
    with pytest.raises(SpecError, match="num_encoder_layers"):
        PruningSpec().resolve(depth)


@pytest.mark.parametrize(
    ("name", "window", "quota", "keep"),
    [("paper", 2, 36, None), ("288", 2, 36, 288), ("192", 3, 32, 192), ("128", 3, 16, 128), ("64", 4, 7, 64)],
)
def test_presets_are_those_of_the_design(name, window, quota, keep):
    spec = PruningSpec.preset(name)
    assert spec == PRESETS[name]
    assert (spec.regions, spec.window, spec.keep) == (2, window, keep)
    assert spec.quotas(GRID).tolist() == [quota] * 4
    assert spec.capacity(GRID) == (keep or 288)


def test_stages_of_an_exact_preset_add_up_to_its_count():
    for name in ("288", "192", "128", "64"):
        spec = PRESETS[name]
        num_windows = len(np.unique(partition.window_ids(GRID, spec.window)))
        assert spec.quotas(GRID).sum() + num_windows == spec.keep


def test_preset_keeps_its_share_on_another_grid():
    assert PruningSpec.preset("192", (27, 27)) == replace(PRESETS["192"], keep=243)
    assert PruningSpec.preset("64", (16, 16)) == replace(PRESETS["64"], keep=28)
    assert PruningSpec.preset("64", (4, 4)).keep == 2
    assert PruningSpec.preset("paper", (16, 12)) == PRESETS["paper"]


def test_preset_larger_than_the_grid_is_an_error_that_names_both():
    with pytest.raises(SpecError, match=r"'64'.*window is 4.*3 x 9"):
        PruningSpec.preset("64", (3, 9))


def test_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(SpecError, match="paper, 288, 192, 128, 64"):
        PruningSpec.preset("256")


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["paper"] = PruningSpec(window=3)


@pytest.mark.parametrize(
    ("spec", "grid", "message"),
    [
        (PruningSpec(window=5), (4, 9), "window is 5"),
        (PruningSpec(regions=5), (9, 4), "regions is 5"),
        (PruningSpec(keep=17), (4, 4), "keep is 17"),
        (PruningSpec(), (0, 4), "rows"),
        (PruningSpec(), (4, -1), "columns"),
        (PruningSpec(), (4, 4.0), "columns"),
        (PruningSpec(), (True, 4), "rows"),
        (PruningSpec(), (4, 4, 4), "a grid is"),
    ],
)
def test_spec_that_does_not_fit_the_grid_is_an_error(spec, grid, message):
    for method in (spec.validate, spec.capacity, spec.quotas):
        with pytest.raises(SpecError, match=message):
            method(grid)


def test_spec_that_just_fits_is_none():
    PruningSpec(regions=4, window=4, keep=16).validate((4, 4))


@pytest.mark.parametrize(
    ("spec", "grid", "capacity"),
    [
        (PruningSpec(), GRID, 288),
        (PruningSpec(), (5, 7), (1 + 2 + 2 + 3) + 12),
        (PruningSpec(global_ratio=0.0), (5, 7), 12),
        (PruningSpec(global_ratio=1.0), (5, 7), 35),
        (PruningSpec(global_ratio=0.9, regions=1, window=1), (4, 4), 16),
        (PruningSpec(keep=3), (5, 7), 3),
    ],
)
def test_capacity_is_the_most_that_can_be_kept(spec, grid, capacity):
    assert spec.capacity(grid) == capacity


@pytest.mark.parametrize("num_kept", range(145))
def test_a_ratio_written_as_a_fraction_gives_the_whole_number(num_kept):
    assert PruningSpec(global_ratio=num_kept / 144).quotas(GRID).tolist() == [num_kept] * 4


def test_regions_split_a_grid_that_they_do_not_divide():
    ids = partition.region_ids((5, 7), 2).reshape(5, 7)
    assert ids[:, 0].tolist() == [0, 0, 2, 2, 2]
    assert ids[0].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_windows_at_the_edge_are_smaller():
    ids = partition.window_ids((5, 7), 3).reshape(5, 7)
    assert ids[0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert ids[:, 6].tolist() == [2, 2, 2, 5, 5]


def test_settings_survive_json():
    for spec in (*PRESETS.values(), PruningSpec(first_layer=6, num_layers=3, keep=7)):
        assert PruningSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_unknown_settings_are_an_error_that_names_them():
    with pytest.raises(SpecError, match="window_size"):
        PruningSpec.from_dict(PruningSpec().to_dict() | {"window_size": 2})


def test_missing_settings_are_an_error_that_names_them():
    settings = PruningSpec().to_dict()
    del settings["window"]
    with pytest.raises(SpecError, match="window"):
        PruningSpec.from_dict(settings)


def test_bad_settings_read_from_a_file_are_an_error():
    with pytest.raises(SpecError, match="window"):
        PruningSpec.from_dict(PruningSpec().to_dict() | {"window": "2"})


def test_op_attributes_are_named_in_order():
    attributes = op.attributes(GRID, PRESETS["192"])
    assert tuple(attributes) == op.ATTRIBUTES
    assert attributes | {"global_ratio": 0} == {
        "rows": 24, "cols": 24, "regions": 2, "global_ratio": 0, "window": 3, "keep": 192,
    }  # fmt: skip
    assert op.attributes(GRID, PRESETS["paper"])["keep"] == op.NO_KEEP


def test_ratio_of_the_op_gives_the_quotas_of_the_spec_in_float32():
    spec, grid = PruningSpec(global_ratio=0.7), (20, 20)
    nearest = replace(spec, global_ratio=float(np.float32(0.7)))
    assert nearest.quotas(grid).tolist() == [69] * 4, "else this shows nothing"
    ratio = op.attributes(grid, spec)["global_ratio"]
    assert ratio == float(np.float32(ratio))
    assert replace(spec, global_ratio=ratio).quotas(grid).tolist() == [70] * 4


def test_public_names_are_exported():
    assert set(hivtp_ops.__all__) == {
        "PruningSpec", "PRESETS", "Selection", "select", "HivtpError", "SpecError", "ScoreError",
    }  # fmt: skip
    assert all(hasattr(hivtp_ops, name) for name in hivtp_ops.__all__)
