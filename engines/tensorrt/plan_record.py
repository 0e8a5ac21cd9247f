"""The sidecar of a plan: what the plan is of, for which machine, and how it was checked."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping  # noqa: TC003  the hints are read at run time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hivtp.engines.files import parse_json
from hivtp.engines.gpu import Gpu  # noqa: TC001  the hints are read at run time
from hivtp.engines.manifest import FileRecord  # noqa: TC001  the hints are read at run time
from hivtp.engines.record import read_record, shown
from hivtp.engines.tensorrt.profile import TileProfile
from hivtp.engines.tensorrt.timing_cache import as_file_name
from hivtp_ops.errors import BundleError, EngineError

if TYPE_CHECKING:
    from hivtp.engines.tensorrt.library import Library

PLAN_SCHEMA_VERSION = 1
# What TensorRT for RTX builds for by default (its guide, "CPU-Only AOT").
MIN_PORTABLE_CAPABILITY = (8, 0)
# Products in fp8 came with Ada; Hopper and Blackwell have them too.
MIN_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class PlanRecord:
    """The sidecar of a plan.

    Attributes:
        plan: size and hash of the plan.
        graph: the sha256 of each file of the ONNX graph that it was built from, by its path in the bundle.
        library: "tensorrt" or "tensorrt-rtx".
        library_version: all of it.
        platform: operating system and processor, e.g. "linux-x86_64".
        gpu: on which it was built; None where there was none.
        is_portable: whether it runs on every RTX GPU since Ampere, or in fp8 since Ada; if not, on GPUs like `gpu`
            alone.
        profiles: the numbers of tiles, each fewest:usual:most.
        pruning: "plugin" or "function"; None where nothing is pruned.
        precision: of the graph.
        allows_tf32: whether float32 products may run in TF32.
        workspace_bytes, optimization_level: see BuildSettings.
        verification: `is_done`, and the errors reached and allowed, or the reason why not.
        versions: of hivtp.
        schema_version: of this layout.
    """

    plan: FileRecord
    graph: Mapping[str, str]
    library: str
    library_version: str
    platform: str
    gpu: Gpu | None
    is_portable: bool
    profiles: tuple[str, ...]
    pruning: str | None
    precision: str
    allows_tf32: bool
    workspace_bytes: int | None
    optimization_level: int
    verification: Mapping[str, Any]
    versions: Mapping[str, str]
    schema_version: int = PLAN_SCHEMA_VERSION

    def with_verification(self, verification: Mapping[str, Any]) -> PlanRecord:
        """The same with the result of the check."""
        return replace(self, verification=verification)

    @property
    def tile_profiles(self) -> tuple[TileProfile, ...]:
        """The profiles, in the plan's order."""
        return tuple(TileProfile.parse(text) for text in self.profiles)

    @property
    def stem(self) -> str:
        """The name of the files, one per machine: library, version, GPU."""
        parts = [self.library, self.library_version, "any-rtx"]
        if self.gpu is not None and not self.is_portable:
            parts[2:] = [self.gpu.name, "sm{}{}".format(*self.gpu.compute_capability)]
        return "-".join(map(as_file_name, parts))

    def to_json(self) -> str:
        """The sidecar as it is written."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str) -> PlanRecord:
        """Read a sidecar.

        Raises:
            BundleError: it is damaged or of another schema.
        """
        try:
            raw = parse_json(text)
            version = raw["schema_version"]
            if version != PLAN_SCHEMA_VERSION or isinstance(version, bool):
                raise BundleError(f"has a sidecar of version {shown(version)}, this hivtp reads {PLAN_SCHEMA_VERSION}")
            record = read_record(cls, raw)
            _ = record.tile_profiles
        except (KeyError, TypeError, ValueError, EngineError) as error:
            raise BundleError(f"has a damaged sidecar: {type(error).__name__}: {error}") from error
        return record

    @property
    def min_capability(self) -> tuple[int, int]:
        """The oldest compute capability that a portable plan runs on."""
        return MIN_FP8_CAPABILITY if self.precision == "fp8" else MIN_PORTABLE_CAPABILITY

    def check_fits(self, library: Library, gpu: Gpu | None, graph: Mapping[str, str]) -> None:
        """Refuse a plan that cannot run here.

        Args:
            library: would run it.
            gpu: of this machine.
            graph: see graph_hashes.

        Raises:
            EngineError: the first reason found, as the rest of a sentence about the plan.
        """
        if self.graph != graph:
            raise EngineError("was built from another graph than the bundle holds now")
        if (self.library, self.library_version) != (library.name, library.version):
            raise EngineError(f"was built by {self.library} {self.library_version}, and {library.version} is installed")
        if self.platform != sysconfig.get_platform():
            raise EngineError(f"was built on {self.platform}, and this is {sysconfig.get_platform()}")
        if gpu is None:
            raise EngineError("needs an NVIDIA GPU with its driver, and there is none here")
        if self.is_portable:
            if gpu.compute_capability < self.min_capability:
                minimum = ".".join(map(str, self.min_capability))
                raise EngineError(f"runs on GPUs of compute capability {minimum} and later, and this is {gpu}")
        elif self.gpu is None or (self.gpu.name, self.gpu.compute_capability) != (gpu.name, gpu.compute_capability):
            raise EngineError(f"was built for {self.gpu}, and this is {gpu}")
