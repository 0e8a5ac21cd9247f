from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import polygraphy
import pytest

from hivtp.runtime.integrations.polygraphy import side_by_side
from hivtp.runtime.integrations.polygraphy.comparison import (
    ALL_ENGINES,
    CompareSettings,
    Comparison,
    Measurement,
    RunnerSettings,
)
from hivtp.runtime.integrations.polygraphy.side_by_side import compare_bundles
from hivtp.runtime.vision.agreement import Agreement
from hivtp_ops.errors import BundleError, EngineError, HivtpError, ImageError, MissingExtraError, SettingsError
from tests.support.faults import LATER_WEIGHT, SCORING_WEIGHT, alter_weight

if TYPE_CHECKING:
    from pathlib import Path

CPU = ("onnxruntime", "polygraphy-onnxrt")


def settings(*engines: str, **options: object) -> CompareSettings:
    return CompareSettings(engines or ("onnxruntime",), rounds=2, **options)


def measured(comparison: Comparison) -> list[Measurement]:
    found = [system.result for system in comparison.systems]
    assert all(isinstance(result, Measurement) for result in found), found
    return found


def test_engines_of_one_bundle_agree(either_bundle, tiny_checkpoint, next_checkpoint, images, request):
    is_next = either_bundle == request.getfixturevalue("next_bundle")
    runner = RunnerSettings(next_checkpoint if is_next else tiny_checkpoint, num_threads=1)
    comparison = compare_bundles([either_bundle], images, settings(*CPU, "transformers", runner=runner))
    reference, same, tower = measured(comparison)
    assert reference.agreement is None
    assert same.agreement == Agreement(1, 1, 0, 0, 0)
    assert 0 < tower.agreement.relative_error < 1e-5
    assert 0 < tower.agreement.importance_error < 1e-4
    assert tower.agreement.kept_jaccard == 1
    assert comparison.problems == []
    for result in (reference, same, tower):
        assert result.kept_tokens == reference.kept_tokens
        assert [len(samples) for samples in result.samples_ms] == [3, 3]
        assert min(min(samples) for samples in result.samples_ms) > 0
        assert result.peak_bytes >= 0


def test_engines_that_cannot_run_are_listed_with_the_reason(bare_bundle, images):
    comparison = compare_bundles([bare_bundle], images[:1], CompareSettings(rounds=1))
    assert [system.engine for system in comparison.systems] == list(ALL_ENGINES)
    results = {system.engine: system.result for system in comparison.systems}
    assert isinstance(results["onnxruntime"], Measurement)
    assert "name its folder as the checkpoint" in results["transformers"]


def test_the_reference_is_the_first_that_runs(bare_bundle, images):
    comparison = compare_bundles([bare_bundle], images[:1], settings("transformers", *CPU))
    tower, first, second = (system.result for system in comparison.systems)
    assert isinstance(tower, str)
    assert first.agreement is None
    assert second.agreement is not None


def test_bundles_of_less_precision_are_bounded_by_their_own_tolerance(pruned_bundle, int8_bundle, images):
    one_way = compare_bundles([pruned_bundle, int8_bundle], images, settings())
    other_way = compare_bundles([int8_bundle, pruned_bundle], images, settings())
    for comparison in (one_way, other_way):
        _, second = measured(comparison)
        assert second.tolerance.relative_error == 0.1
        assert 0 < second.agreement.relative_error < 0.1
        assert second.agreement.importance_error > 0
        assert comparison.problems == []
        assert [system.precision for system in comparison.systems] in (["fp32", "int8"], ["int8", "fp32"])


def test_another_preset_keeps_other_patches_with_the_same_embeddings(pruned_bundle, exact_bundle, images):
    comparison = compare_bundles([pruned_bundle, exact_bundle], images, settings())
    first, second = measured(comparison)
    assert second.kept_tokens == (21, 21, 21)
    assert sum(first.kept_tokens) > 63
    assert second.agreement.kept_jaccard < 0.9
    assert second.agreement.relative_error < 1e-6
    [problem] = comparison.problems
    assert problem.startswith(f"{exact_bundle} in onnxruntime: kept patches agree to 0.")


def test_an_unpruned_bundle_keeps_every_patch(next_bundle, make_next_bundle, images):
    comparison = compare_bundles([next_bundle, make_next_bundle(is_pruned=False)], images[:1], settings(*CPU))
    *_, unpruned, same = measured(comparison)
    assert unpruned.kept_tokens == same.kept_tokens == (5 * 64,)
    assert unpruned.agreement.importance_error is None
    assert unpruned.agreement.relative_error < 1e-5


def test_altered_weights_are_seen_where_they_stand(either_bundle, tmp_path, images):
    later = alter_weight(either_bundle, tmp_path / "later", LATER_WEIGHT, 1.01)
    scoring = alter_weight(either_bundle, tmp_path / "scoring", SCORING_WEIGHT, 3)
    comparison = compare_bundles([either_bundle, later, scoring], images, settings())
    _, off, ranked = (result.agreement for result in measured(comparison))
    assert off.kept_jaccard == 1
    assert off.importance_error == 0
    # A bias is added to what was scaled.
    assert 0.003 < off.relative_error < 0.02
    assert 0.003 < off.median_row_error < 0.02
    assert ranked.kept_jaccard < 0.99
    assert ranked.importance_error > 0.1
    assert len(comparison.problems) == 2


def test_an_int8_graph_sees_one_tile_at_a_time_also_in_polygraphys_runner(next_int8_bundle, next_bundle, images):
    comparison = compare_bundles([next_int8_bundle, next_bundle], images, settings(*CPU))
    _, same, full, full_too = measured(comparison)
    assert same.agreement.relative_error == 0
    assert full.agreement == full_too.agreement
    assert full.kept_tokens == full_too.kept_tokens
    assert len(full.kept_tokens) == 3


def test_everything_is_plain_json(bare_bundle, images):
    comparison = compare_bundles([bare_bundle], images[:2], settings(*CPU, "transformers"))
    found = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert found["num_images"] == 2
    reference, same, tower = found["systems"]
    assert list(tower) == ["bundle", "precision", "engine", "error"]
    assert reference["is_reference"]
    assert reference["agreement"] is None
    assert same["agreement"]["kept_jaccard"] == 1
    assert same["latency_ms"]["min"] <= same["latency_ms"]["median"]
    assert [len(samples) for samples in same["latency_ms"]["samples"]] == [2, 2]


def test_what_is_not_finite_is_null_in_json(either_bundle, tmp_path, images):
    lost = alter_weight(either_bundle, tmp_path / "lost", LATER_WEIGHT, float("nan"))
    comparison = compare_bundles([either_bundle, lost], images[:1], settings())
    found = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["systems"][1]
    assert found["agreement"]["relative_error"] is None
    assert found["problems"] == ["embeddings differ by nan, allowed is at most 0.0001"]


def test_bundles_that_say_nothing_of_each_other_are_refused(bare_bundle, next_bundle, make_bundle, tmp_path, images):
    with pytest.raises(BundleError, match=r"was exported from another checkpoint \(checkpoint\) than"):
        compare_bundles([bare_bundle, next_bundle], images, settings())
    with pytest.raises(BundleError, match="holds an encoder graph, which keeps no patches"):
        compare_bundles([make_bundle(graph="encoder")], images, settings())
    other = shutil.copytree(bare_bundle, tmp_path / "other")
    file = other / "processor" / "image_processor.json"
    # As many bytes as before, so that the bundle opens.
    file.write_text(file.read_text().replace("0.2", "0.3", 1))
    with pytest.raises(BundleError, match="prepares images otherwise than"):
        compare_bundles([bare_bundle, other], images, settings())


def test_bad_input_is_refused_before_an_engine_opens(bare_bundle, images, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "open_runner", lambda *_: pytest.fail("an engine was opened"))
    with pytest.raises(ImageError, match="nothing to compare without an image"):
        compare_bundles([bare_bundle], [], settings())
    with pytest.raises(ImageError, match="there is no image file"):
        compare_bundles([bare_bundle], [*images, str(tmp_path / "absent.png")], settings())
    with pytest.raises(BundleError, match="is not a folder"):
        compare_bundles([bare_bundle, tmp_path / "absent"], images, settings())


@pytest.mark.parametrize("engines", [("onnxruntime", "caffe"), (), ("auto",)])
def test_an_unknown_engine_is_refused(engines):
    with pytest.raises(SettingsError, match=r"no engine is named .*; there are onnxruntime, "):
        CompareSettings(engines)


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5])
def test_there_is_at_least_one_round(rounds):
    with pytest.raises(SettingsError, match="rounds must be a whole number, 1 or more"):
        CompareSettings(rounds=rounds)


def test_where_no_engine_runs_all_reasons_are_given(bare_bundle, images):
    with pytest.raises(EngineError, match=r"no engine can run .* here: transformers: .*; polygraphy-trt: "):
        compare_bundles([bare_bundle], images, settings("transformers", "polygraphy-trt"))


def test_without_polygraphy_the_extra_is_named(bare_bundle, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(
        MissingExtraError, match=r"^polygraphy is not installed; install it with: pip install 'hivtp\[compare\]'$"
    ):
        compare_bundles([bare_bundle], images, settings())


def test_another_polygraphy_is_refused(bare_bundle, images, monkeypatch):
    monkeypatch.setattr(polygraphy, "__version__", "0.60.1")
    with pytest.raises(HivtpError, match=r"polygraphy 0\.60\.1 is installed, and hivtp works with 0\.53"):
        compare_bundles([bare_bundle], images, settings())


def test_a_graph_that_gives_other_outputs_is_named_and_not_run(bare_bundle, tmp_path, images):
    """Its manifest may be a stranger's: here of more prefix tokens than the graph has."""
    other: Path = shutil.copytree(bare_bundle, tmp_path / "other")
    file = other / "manifest.json"
    raw = json.loads(file.read_text())
    raw["vision"]["num_prefix_tokens"] = 1
    file.write_text(json.dumps(raw))
    comparison = compare_bundles([bare_bundle, other], images[:1], settings(*CPU))
    assert isinstance(comparison.systems[2].result, str)
    assert "are not outputs of one vision graph" in comparison.systems[3].result
