"""Builds a plan into a bundle, on the machine that runs it, and compares it with the graph in ONNX Runtime."""

from __future__ import annotations

import sysconfig
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hivtp.engines import create_engine
from hivtp.engines.base import EngineSettings
from hivtp.engines.bundle import Bundle
from hivtp.engines.gpu import Gpu, find_gpu
from hivtp.engines.manifest import FileRecord
from hivtp.engines.tensorrt.builder import BuildSettings, BuiltPlan, build_plan
from hivtp.engines.tensorrt.library import Library, LibraryName, load_library
from hivtp.engines.tensorrt.plan import graph_hashes, sha256_of_plan, write_plan
from hivtp.engines.tensorrt.plan_record import MIN_FP8_CAPABILITY, PlanRecord
from hivtp.engines.tensorrt.profile import TileProfile
from hivtp.engines.tensorrt.timing_cache import cache_file, default_cache_folder, read_cache, write_cache
from hivtp.export.progress import Progress
from hivtp.export.verify.plan import verify_plan
from hivtp_ops.errors import EngineError, EngineWarning, HivtpError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

NUM_STEPS = 3
# Tuned for one image at a time; a batch of more goes through the graph in runs of up to 8.
LLAVA_TILES = TileProfile(1, 1, 8)


@dataclass(frozen=True)
class PlanSettings:
    """Which plan to build.

    Attributes:
        library: "tensorrt" or "tensorrt-rtx".
        profiles: the numbers of tiles; empty for the model's own: tuned for one image, and up to 8 tiles.
        workspace_bytes, optimization_level, allows_tf32: see BuildSettings.
        timing_cache: folder for what TensorRT measures; None for `default_cache_folder`.
    """

    library: LibraryName
    profiles: tuple[TileProfile, ...] = ()
    workspace_bytes: int | None = BuildSettings.workspace_bytes
    optimization_level: int = BuildSettings.optimization_level
    allows_tf32: bool = BuildSettings.allows_tf32
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        # Refuses what cannot be before any work is done.
        _ = self.build_settings((LLAVA_TILES,))

    def build_settings(self, default_profiles: tuple[TileProfile, ...]) -> BuildSettings:
        """The settings of the build."""
        return BuildSettings(
            self.profiles or default_profiles, self.workspace_bytes, self.optimization_level, self.allows_tf32
        )


@dataclass(frozen=True)
class Builder:
    """A library on this machine that can build plans.

    Attributes:
        library: builds.
        gpu: of this machine, if any.
    """

    library: Library
    gpu: Gpu | None

    @classmethod
    def find(cls, settings: PlanSettings, precision: str) -> Builder:
        """Find out whether a plan can be built here, which takes no time.

        Raises:
            MissingExtraError: the library, cuda-core, or onnxruntime, which a plan is compared in, is not installed.
            EngineError: the library needs a GPU and there is none, or it or the GPU cannot take the precision.
        """
        if precision == "int8":
            raise EngineError(
                "the int8 vision graph is made for the CPU, and TensorRT cannot take it; "
                "export it with --vision-precision fp16 or fp8"
            )
        library, gpu = load_library(settings.library), find_gpu(settings.library)
        if gpu is None and not library.builds_without_gpu:
            raise EngineError(
                f"{library.name} builds a plan on the GPU that will run it, and no NVIDIA GPU with its driver was "
                "found here; build it there, from a copy of the bundle (tensorrt-rtx builds anywhere, for RTX GPUs)"
            )
        # A library that builds without a GPU may build for another one than is here.
        lacks_fp8 = gpu is not None and gpu.compute_capability < MIN_FP8_CAPABILITY
        if precision == "fp8" and lacks_fp8 and not library.builds_without_gpu:
            raise EngineError(
                f"{gpu} has no products in fp8, which came with compute capability "
                f"{'.'.join(map(str, MIN_FP8_CAPABILITY))}; export the bundle with --vision-precision fp16"
            )
        if gpu is not None and find_spec("onnxruntime") is None:
            raise MissingExtraError("onnxruntime", "cpu")
        return cls(library, gpu)


def export_plan(folder: str | Path, settings: PlanSettings, *, is_quiet: bool = False) -> tuple[Path, PlanRecord]:
    """Build a plan of a bundle's vision graph, compare it with the graph, and put it into the bundle.

    A plan serves the machine that built it. So the manifest, which says what the bundle is wherever it goes, does not
    list it; a sidecar has its hash and the graph's. A plan of TensorRT for RTX serves every RTX GPU since Ampere (in
    fp8 since Ada); it can be built without a GPU, and then it is not compared, which the sidecar says. A plan is code,
    so this machine records that it built this one; elsewhere it is loaded only with `trust_plans=True`.

    Args:
        folder: the bundle.
        settings: which plan.
        is_quiet: print no progress.

    Returns:
        The plan's file and its sidecar's content.

    Raises:
        BundleError: the bundle is incomplete or altered, or the plan cannot be written.
        EngineError: a plan cannot be built here, or TensorRT cannot take the graph.
        VerificationError: the engine differs from the graph by more than the precision's tolerance.
        MissingExtraError: a package is not installed.
    """
    progress = Progress(NUM_STEPS, is_quiet)
    with progress.step(f"Bundle {folder}"):
        # The plan vouches for the graph by its hash, so the graph must be the one that the manifest names.
        bundle = Bundle.open(folder, check_hashes=True)
        precision = bundle.manifest.vision.precision
        builder = Builder.find(settings, precision)
    build_settings = settings.build_settings(_default_profiles(bundle))
    if precision == "fp32" and settings.allows_tf32:
        warnings.warn(
            "the vision graph is float32, and TensorRT runs its matrix products in TF32, with the mantissa of fp16 "
            "and slower than fp16; export with --vision-precision fp16, or give --no-tf32 for full float32",
            EngineWarning,
            stacklevel=2,
        )
    with progress.step(f"Plan by {builder.library.name} {builder.library.version}"):
        built = _build(builder, bundle, build_settings, settings.timing_cache or default_cache_folder(), progress)
    with progress.step("Plan against the ONNX graph"):
        record = _record(builder, bundle, build_settings, built)
        record = record.with_verification(_verify(builder, bundle, build_settings, built, record))
        file = write_plan(bundle, record, built.content)
    return file, record


def _default_profiles(bundle: Bundle) -> tuple[TileProfile, ...]:
    tiling = bundle.manifest.tiling
    if tiling is None:
        return (LLAVA_TILES,)
    side = bundle.manifest.vision.image_size
    # The base tile, and a grid of tiles.
    most = 1 + max((height // side) * (width // side) for height, width in tiling.pinpoints)
    return (TileProfile(1, most, max(most, LLAVA_TILES.maximum)),)


def _build(
    builder: Builder, bundle: Bundle, settings: BuildSettings, cache_folder: Path, progress: Progress
) -> BuiltPlan:
    # Where there is no GPU, nothing is measured.
    cache = None if builder.gpu is None else cache_file(cache_folder, builder.library, builder.gpu)
    known = b"" if cache is None else read_cache(cache)
    _offer_kernel(builder)
    built = build_plan(builder.library, bundle.vision_file, settings, known, progress.update)
    if cache is not None and built.timing_cache:
        write_cache(cache, built.timing_cache)
    return built


def _offer_kernel(builder: Builder) -> None:
    """Let the parser take the selection as one kernel, where it runs; the function in the graph is its fallback."""
    from hivtp_ops.kernel import MIN_CAPABILITY
    from hivtp_ops.tensorrt_plugin import register_plugin

    # TensorRT for RTX has no Python plugins.
    if builder.library.name != "tensorrt" or builder.gpu is None:
        return
    if builder.gpu.compute_capability < MIN_CAPABILITY:
        return
    try:
        register_plugin()
    except HivtpError as error:
        warnings.warn(f"the selection will run as many small kernels, not as one: {error}", EngineWarning, stacklevel=2)


def _record(builder: Builder, bundle: Bundle, settings: BuildSettings, built: BuiltPlan) -> PlanRecord:
    return PlanRecord(
        plan=FileRecord(built.content.nbytes, sha256_of_plan(built.content)),
        graph=graph_hashes(bundle),
        library=builder.library.name,
        library_version=builder.library.version,
        platform=sysconfig.get_platform(),
        gpu=builder.gpu,
        is_portable=builder.library.builds_without_gpu,
        profiles=tuple(map(str, settings.profiles)),
        pruning=built.pruning,
        precision=bundle.manifest.vision.precision,
        allows_tf32=settings.allows_tf32,
        workspace_bytes=settings.workspace_bytes,
        optimization_level=settings.optimization_level,
        verification={},
        versions={"hivtp": version("hivtp")},
    )


def _verify(
    builder: Builder, bundle: Bundle, settings: BuildSettings, built: BuiltPlan, record: PlanRecord
) -> dict[str, Any]:
    if builder.gpu is None:
        return {"is_done": False, "reason": "there was no GPU to run it on"}
    from hivtp.engines.tensorrt.session import TensorRtEngine

    try:
        engine = TensorRtEngine(builder.library, bytes(built.content), record, EngineSettings())
    except EngineError as error:
        # One that is built for other GPUs need not run on this one.
        if not record.is_portable:
            raise
        return {"is_done": False, "reason": f"the GPU here cannot run it ({error})"}
    reference = create_engine("onnxruntime", bundle.vision_file)
    sizes = sorted({size for profile in settings.profiles for size in (profile.minimum, profile.optimum)})
    return verify_plan(engine, reference, bundle.manifest, sizes, allows_tf32=settings.allows_tf32)
