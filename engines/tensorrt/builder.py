"""Builds a plan: an ONNX graph in, a serialized TensorRT engine out. Strongly typed: the graph alone says precision."""

from __future__ import annotations

import contextlib
import threading
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hivtp.engines.tensorrt.profile import TileProfile, check_profiles
from hivtp.engines.tensorrt.progress import make_monitor
from hivtp_ops.errors import EngineError, EngineWarning

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hivtp.engines.tensorrt.library import Library

MAX_OPTIMIZATION_LEVEL = 5
# How many of a parser's complaints an error quotes.
NUM_QUOTED_ERRORS = 3
PLUGIN_LAYERS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
PruningForm = Literal["plugin", "function"]


@dataclass(frozen=True)
class BuildSettings:
    """How to build a plan.

    Attributes:
        profiles: the numbers of tiles, together every one from 1 to the largest.
        workspace_bytes: most GPU memory for intermediate results; None leaves the choice to TensorRT.
        optimization_level: 0 builds fastest, 5 tries most.
        allows_tf32: float32 matrix products in TF32, whose mantissa has 10 bits.
    """

    profiles: tuple[TileProfile, ...]
    workspace_bytes: int | None = None
    optimization_level: int = 3
    allows_tf32: bool = True

    def __post_init__(self) -> None:
        check_profiles(self.profiles)
        if not 0 <= self.optimization_level <= MAX_OPTIMIZATION_LEVEL:
            raise EngineError(
                f"the optimization level is {self.optimization_level}; give 0 to {MAX_OPTIMIZATION_LEVEL}"
            )
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise EngineError(f"the workspace is {self.workspace_bytes} bytes; give more, or leave it to TensorRT")


@dataclass(frozen=True)
class BuiltPlan:
    """What a build gives.

    Attributes:
        content: the plan, a buffer of bytes.
        pruning: whether TensorRT took the plugin of the pruning op or its function body; None where there is none.
        timing_cache: what was measured, for the next build; empty where the library keeps none.
    """

    content: memoryview
    pruning: PruningForm | None
    timing_cache: bytes


def build_plan(
    library: Library,
    graph: Path,
    settings: BuildSettings,
    timing_cache: bytes = b"",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> BuiltPlan:
    """Build a plan of a graph whose first dimensions are the number of tiles.

    Args:
        library: builds it.
        graph: the .onnx file; its weights lie beside it.
        settings: how to build it.
        timing_cache: of an earlier build by the same library on the same GPU.
        on_progress: called with (steps done, all steps), from other threads.

    Raises:
        EngineError: TensorRT cannot take the graph, and why; or the build failed.
        KeyboardInterrupt: the build was stopped, at the next step of the builder.
    """
    return _Build(library, graph, settings, timing_cache, on_progress).run()


@dataclass
class _Build:
    library: Library
    graph: Path
    settings: BuildSettings
    timing_cache: bytes
    on_progress: Callable[[int, int], None]
    should_stop: threading.Event = field(default_factory=threading.Event)
    has_ended: threading.Event = field(default_factory=threading.Event)
    result: BuiltPlan | BaseException | None = None

    def run(self) -> BuiltPlan:
        # In a thread of its own, since Python hears Ctrl-C between its own steps only and a build is one long call.
        threading.Thread(target=self._run).start()
        try:
            # Not by `join`: once interrupted, it takes the thread for ended.
            self.has_ended.wait()
        except BaseException:
            self.should_stop.set()
            self._wait_for_end()
            raise
        if isinstance(self.result, BaseException):
            raise self.result
        assert self.result is not None, "a thread that ends leaves a result"
        return self.result

    def _wait_for_end(self) -> None:
        # However often Ctrl-C is pressed: a process that ends within TensorRT is aborted.
        while not self.has_ended.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                self.has_ended.wait()

    def _run(self) -> None:
        try:
            self.result = self._build()
        except BaseException as error:  # noqa: BLE001  it is raised again in the thread that waits
            self.result = error
        finally:
            self.has_ended.set()

    def _build(self) -> BuiltPlan:
        library, trt = self.library, self.library.module
        library.messages.clear()
        builder = trt.Builder(library.logger)
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, library.logger)
        # By path: only so are weights beside the graph found.
        if not parser.parse_from_file(str(self.graph)):
            raise _parser_error(library, parser, self.graph)
        config = builder.create_builder_config()
        self._configure(config)
        self._add_profiles(builder, network, config)
        cache = self._use_timing_cache(config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise library.failure(f"cannot build a plan of {self.graph}")
        return BuiltPlan(memoryview(plan), _pruning_form(trt, network), cache())

    def _configure(self, config: Any) -> None:
        trt, settings = self.library.module, self.settings
        config.builder_optimization_level = settings.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = make_monitor(trt, self.on_progress, self.should_stop)
        if settings.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        if not settings.allows_tf32:
            config.clear_flag(trt.BuilderFlag.TF32)

    def _add_profiles(self, builder: Any, network: Any, config: Any) -> None:
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        for tiles in self.settings.profiles:
            profile = builder.create_optimization_profile()
            for value in inputs:
                tail = tuple(value.shape)[1:]
                shapes = [(num_tiles, *tail) for num_tiles in (tiles.minimum, tiles.optimum, tiles.maximum)]
                profile.set_shape(value.name, *shapes)
            if config.add_optimization_profile(profile) < 0:
                raise self.library.failure(f"cannot build {self.graph} for {tiles} tiles")

    def _use_timing_cache(self, config: Any) -> Callable[[], bytes]:
        """Give the builder the cache; what is returned gives the cache after the build."""
        # TensorRT for RTX measures nothing at build time, and warns where a cache is touched.
        if self.library.builds_without_gpu:
            return bytes
        cache = config.create_timing_cache(self.timing_cache)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            message = "the timing cache is damaged or of another GPU; starting a new one"
            warnings.warn(message, EngineWarning, stacklevel=2)
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return lambda: bytes(memoryview(config.get_timing_cache().serialize()))


def _strongly_typed(trt: Any) -> int:
    # From 11 on there is no other kind, and the flag has no value of its own.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_error(library: Library, parser: Any, graph: Path) -> EngineError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    library.messages.clear()
    quoted = []
    for error in errors[:NUM_QUOTED_ERRORS]:
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        quoted.append(f"{node}{error.code().name}: {error.desc()} [{error.func()}]")
    if len(errors) > NUM_QUOTED_ERRORS:
        quoted.append(f"and {len(errors) - NUM_QUOTED_ERRORS} more")
    reasons = "; ".join(quoted) or "it gives no reason"
    return EngineError(f"{library.name} {library.version} cannot take {graph}: {reasons}")


def _pruning_form(trt: Any, network: Any) -> PruningForm | None:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = {getattr(trt.LayerType, name) for name in PLUGIN_LAYERS if hasattr(trt.LayerType, name)}
    if any(layer.type in kinds for layer in layers):
        return "plugin"
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    return "function" if "kept_indices" in outputs else None
