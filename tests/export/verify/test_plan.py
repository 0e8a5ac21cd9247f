from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.checkpoints import make_checkpoint
from hivtp.engines import create_engine
from hivtp.engines.bundle import Bundle
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.export.verify import plan as plan_verification
from hivtp.export.verify.plan import verify_plan
from hivtp_ops import PruningSpec, select
from hivtp_ops.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.engines import Engine
    from hivtp.engines.base import Arrays


class Altered:
    """An engine whose outputs are changed on their way out."""

    max_tiles = None

    def __init__(self, engine: Engine, alter: Callable[[dict[str, Any]], object]) -> None:
        self.engine = engine
        self.alter = alter
        self.output_names = engine.output_names

    def run(self, inputs: Arrays) -> dict[str, Any]:
        outputs = {name: array.copy() for name, array in self.engine.run(inputs).items()}
        self.alter(outputs)
        return outputs


def open_graph(folder: Path) -> tuple[Engine, Bundle]:
    bundle = Bundle.open(folder)
    return create_engine("onnxruntime", bundle.vision_file), bundle


@pytest.mark.parametrize("folder", ["pruned_bundle", "exact_bundle", "varying_bundle", "unpruned_bundle"])
def test_the_graph_itself_passes_without_an_error(folder, request):
    engine, bundle = open_graph(request.getfixturevalue(folder))
    report = verify_plan(engine, engine, bundle.manifest, [1, 3])
    assert report["is_done"]
    assert report["tiles"] == [1, 3]
    assert report["relative_error"] == 0
    is_pruned = folder != "unpruned_bundle"
    assert (report["importance_error"], report["kept_jaccard"]) == ((0, 1) if is_pruned else (None, None))


def test_llava_next_is_compared_with_padding(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="llava_next")
    folder = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(preset="192"), is_quiet=True).folder
    engine, bundle = open_graph(folder)
    assert verify_plan(engine, engine, bundle.manifest, [5])["kept_jaccard"] == 1


def test_an_encoder_graph_is_compared_in_all_its_outputs(tiny_checkpoint, tmp_path):
    folder = export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportSettings(graph="encoder"), is_quiet=True).folder
    engine, bundle = open_graph(folder)
    assert verify_plan(engine, engine, bundle.manifest, [2])["importance_error"] == 0
    off = Altered(engine, lambda outputs: scale(outputs["attention"], 1.01))
    with pytest.raises(VerificationError, match=r"relative error is 0\.01, allowed is at most 0\.0001"):
        verify_plan(off, engine, bundle.manifest, [2])


def test_an_engine_of_less_precision_passes_by_that_precision_alone(tiny_checkpoint, pruned_bundle, tmp_path):
    settings = ExportSettings(vision_precision="fp16")
    half, half_bundle = open_graph(export_bundle(tiny_checkpoint, tmp_path / "half", settings, is_quiet=True).folder)
    full, full_bundle = open_graph(pruned_bundle)
    report = verify_plan(half, full, half_bundle.manifest, [2])
    assert 0 < report["relative_error"] < report["tolerance"]["relative_error"]
    with pytest.raises(VerificationError, match="differs from the ONNX graph"):
        verify_plan(half, full, full_bundle.manifest, [2])
    # TF32 is as coarse as fp16.
    assert verify_plan(half, full, full_bundle.manifest, [2], allows_tf32=True)["tolerance"] == report["tolerance"]


def scale(array: np.ndarray, factor: float) -> None:
    np.multiply(array, factor, out=array)


def swap_kept(outputs: dict[str, Any]) -> None:
    """Keep a patch that the rule does not keep, in place of the last one."""
    kept = outputs["kept_indices"]
    kept[0, -1] = max(set(range(64)) - set(kept[0].tolist()))
    kept[0].sort()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (swap_kept, "keeps other patches than the rule selects from its own scores"),
        (lambda outputs: outputs["kept_counts"].fill(20), "keeps other patches than the rule selects"),
        (lambda outputs: scale(outputs["image_embeds"], 1.001), r"relative error is 0\.001, allowed is at most 0\.000"),
        (lambda outputs: outputs["image_embeds"].fill(np.nan), "relative error is nan"),
        (lambda outputs: scale(outputs["importance"], 1.01), "importance error is"),
        (lambda outputs: outputs["importance"].fill(np.nan), "importance scores hold NaN"),
    ],
)
def test_an_engine_that_is_wrong_is_refused(exact_bundle, alter, message):
    engine, bundle = open_graph(exact_bundle)
    with pytest.raises(VerificationError, match=message):
        verify_plan(Altered(engine, alter), engine, bundle.manifest, [2])


def test_other_kept_sets_are_compared_on_the_patches_that_both_keep(exact_bundle):
    engine, bundle = open_graph(exact_bundle)
    manifest = bundle.manifest
    spec = manifest.pruning
    assert isinstance(spec, PruningSpec)

    def rank_anew(outputs: dict[str, Any]) -> None:
        """What an engine does whose scores are slightly other: another patch wins, and its row is other."""
        scores, kept = outputs["importance"][0], outputs["kept_indices"][0]
        least = kept[scores[kept].argmin()]
        scores[least] = -1e-9
        selection = select(outputs["importance"], manifest.vision.grid, spec)
        rows = {patch: row.copy() for patch, row in zip(kept.tolist(), outputs["image_embeds"][0], strict=True)}
        for place, patch in enumerate(selection.indices[0].tolist()):
            outputs["image_embeds"][0, place] = rows.get(patch, 7.0)
        outputs["kept_indices"][:] = selection.indices

    with pytest.raises(VerificationError, match="importance error"):
        verify_plan(Altered(engine, rank_anew), engine, manifest, [1])
    found, expected = Altered(engine, rank_anew), engine
    inputs = plan_verification._sample_inputs(manifest, engine, 1)
    report = plan_verification._compare(found.run(inputs), expected.run(inputs), manifest)
    assert report.relative_error == 0
    assert report.kept_jaccard == pytest.approx(20 / 22)
