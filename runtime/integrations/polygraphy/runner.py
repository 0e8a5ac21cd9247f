"""Engines as runners of Polygraphy, and Polygraphy's own runners on the graph or the plan of a bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp.engines import EngineSettings, open_vision_engine
from hivtp.engines.gpu import find_gpu
from hivtp.engines.onnxruntime import run_errors
from hivtp.engines.tensorrt.library import load_library
from hivtp.engines.tensorrt.plan import read_plan
from hivtp.engines.tensorrt.session import TensorRtEngine
from hivtp.runtime.integrations.polygraphy.base import BaseRunner, polygraphy_errors
from hivtp.runtime.integrations.polygraphy.comparison import RunnerSettings
from hivtp.runtime.integrations.polygraphy.images import find_bundle
from hivtp.runtime.language.torch_errors import require_packages
from hivtp.runtime.vision.agreement import VisionTolerance
from hivtp_ops.errors import EngineError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hivtp.engines.base import Arrays, Engine
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.tensorrt.plan_record import PlanRecord


class EngineRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """Runs the vision graph of a bundle in an engine of hivtp.

    Args:
        open_engine: opens the engine when the runner is activated.
        bundle: says what the graph takes.
        name: of the runner; None lets Polygraphy make one of the prefix.
        prefix: see `name`.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], bundle: Bundle, name: str | None = None, prefix: str = "hivtp"
    ) -> None:
        super().__init__(name=name, prefix=prefix)
        self._open_engine = open_engine
        self._bundle = bundle

    def activate_impl(self) -> None:
        """Open the engine."""
        with polygraphy_errors():
            self._engine = self._open_engine()

    def deactivate_impl(self) -> None:
        """Release the engine."""
        del self._engine

    def get_input_metadata_impl(self) -> Any:
        """Names, dtypes and shapes of the inputs; the number of tiles is free."""
        from polygraphy.common import TensorMetadata

        manifest = self._bundle.manifest
        side = manifest.vision.image_size
        metadata = TensorMetadata().add("pixel_values", np.float32, (None, 3, side, side))
        if manifest.tiling is not None and manifest.pruning is not None:
            metadata.add("patch_mask", np.bool_, (None, manifest.vision.num_patches))
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> dict[str, Any]:
        """Run the graph, in several runs where the engine takes fewer tiles."""
        started = time.perf_counter()
        with polygraphy_errors():
            outputs = _run(self._engine, feed_dict)
        self.inference_time = time.perf_counter() - started
        return outputs


def _run(engine: Engine, inputs: Arrays) -> dict[str, Any]:
    num_tiles = len(inputs["pixel_values"])
    most = engine.max_tiles or num_tiles
    parts = [
        engine.run({name: array[start : start + most] for name, array in inputs.items()})
        for start in range(0, num_tiles, most)
    ]
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def bundle_runner(model: str, engine: str, **settings: Any) -> Any:
    """A runner of hivtp for `polygraphy run`.

    Args:
        model: the vision graph of a bundle, one of its plans, or its folder.
        engine: one of ENGINES.
        settings: see RunnerSettings.
    """
    with polygraphy_errors():
        bundle = find_bundle(model)
    return EngineRunner(
        lambda: open_engine(bundle, engine, RunnerSettings(**settings)), bundle, prefix=f"hivtp-{engine}"
    )


def open_engine(bundle: Bundle, name: str, settings: RunnerSettings) -> Engine:
    """Open one of ENGINES.

    Raises:
        EngineError: it cannot run the graph here, and why.
        CheckpointError: of transformers: the checkpoint is damaged, or not the bundle's.
        MissingExtraError: its package is not installed.
        SettingsError: a setting cannot work.
    """
    if name != "transformers":
        return open_vision_engine(
            bundle,
            name,
            # Tolerances are those of the graph's own precision, so openvino computes in it, too.
            EngineSettings(num_threads=settings.num_threads, precision="float32"),
            trust_plans=settings.trust_plans,
        )
    if settings.checkpoint is None:
        raise SettingsError(
            f"it runs the tower of the checkpoint {bundle.manifest.source.name!r}, from which the bundle was exported: "
            "name its folder as the checkpoint"
        )
    from hivtp.runtime.language.options import LanguageOptions
    from hivtp.runtime.vision.torch_tower import TransformersVision

    return TransformersVision(bundle, LanguageOptions("transformers", checkpoint=settings.checkpoint))


@dataclass(frozen=True)
class OpenedRunner:
    """A runner whose engine is open already, so that activating it costs nothing.

    Attributes:
        runner: of Polygraphy.
        tolerance: how far from a reference it may be: the graph's, or that of the plan, which may be wider.
    """

    runner: Any
    tolerance: VisionTolerance


def open_runner(bundle: Bundle, engine: str, settings: RunnerSettings, name: str) -> OpenedRunner:
    """Open an engine and make a runner of it.

    Args:
        bundle: an opened bundle.
        engine: one of ENGINES or POLYGRAPHY_ENGINES.
        settings: how to open it.
        name: of the runner.

    Raises:
        BundleError: the bundle does not say how exact its vision graph is.
        EngineError: the engine cannot run the graph here, and why; `open_engine` has more.
    """
    tolerance = VisionTolerance.read(bundle.manifest.verification.get("vision", {}))
    if engine == "polygraphy-onnxrt":
        return OpenedRunner(_onnxruntime_runner(bundle, name), tolerance)
    if engine == "polygraphy-trt":
        runner, plan = _tensorrt_runner(bundle, settings, name)
        return OpenedRunner(runner, _plan_tolerance(plan, tolerance))
    opened = open_engine(bundle, engine, settings)
    if isinstance(opened, TensorRtEngine):
        tolerance = _plan_tolerance(opened.record, tolerance)
    return OpenedRunner(EngineRunner(lambda: opened, bundle, name), tolerance)


def _plan_tolerance(plan: PlanRecord, tolerance: VisionTolerance) -> VisionTolerance:
    # A plan of a float32 graph may compute in TF32.
    return VisionTolerance.read(plan.verification) if plan.verification.get("is_done") is True else tolerance


def _onnxruntime_runner(bundle: Bundle, name: str) -> Any:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    require_packages("onnxruntime", extra="cpu")
    import onnxruntime

    # As in hivtp's own sessions: errors alone.
    onnxruntime.set_default_logger_severity(3)
    with run_errors(f"loading {bundle.vision_file}"):
        return OnnxrtRunner(SessionFromOnnx(str(bundle.vision_file))(), name=name)


def _tensorrt_runner(bundle: Bundle, settings: RunnerSettings, name: str) -> tuple[Any, PlanRecord]:
    """Polygraphy's TrtRunner on the plan that hivtp would run. Not yet run on a GPU."""
    library = load_library("tensorrt")
    record, plan = read_plan(bundle, library, find_gpu("tensorrt"), trust_plans=settings.trust_plans)
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    try:
        return TrtRunner(EngineFromBytes(plan)(), name=name), record
    except Exception as error:
        raise EngineError(f"Polygraphy cannot load the plan: {error}") from error
