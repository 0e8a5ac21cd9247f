"""What the scripts time: a checkpoint and its bundles, made once and kept between runs."""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.checkpoints import SHAPES, make_checkpoint
from hivtp.engines.bundle import MANIFEST_NAME
from hivtp.engines.tensorrt.library import MODULES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hivtp.export.decoder.build import DecoderKind
    from hivtp.export.settings import ExportSettings

GpuEngine = Literal["torch-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
PLAN_ENGINES = ("tensorrt", "tensorrt-rtx")


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options that the scripts share."""
    parser.add_argument("--checkpoint", type=Path, help="a LLaVA checkpoint (default: one with random weights)")
    add_run_options(parser, Path(output), "vit-l-0.3b", num_threads=2)


def add_run_options(parser: argparse.ArgumentParser, output: Path, shape: str, num_threads: int) -> None:
    """Add those of a script that makes its checkpoints itself."""
    work_dir = Path(tempfile.gettempdir()) / "hivtp-benchmarks"
    parser.add_argument("--shape", choices=SHAPES, default=shape, help="sizes of what is made (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=work_dir, help="keeps checkpoint and bundles between runs")
    parser.add_argument(
        "--threads", type=int, default=num_threads, help="threads of every system (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=output, help="results as JSON (default: %(default)s)")


def add_length(parser: argparse.ArgumentParser, num_tokens: int) -> None:
    """Add the length of the answers whose decoding is timed, 2 tokens or more."""

    def length(text: str) -> int:
        number = int(text)
        if number < 2:
            raise argparse.ArgumentTypeError("must be 2 or more, to time the decoding")
        return number

    parser.add_argument(
        "--new-tokens", type=length, default=num_tokens, help="length of the answer (default: %(default)s)"
    )


@dataclass(frozen=True)
class Workspace:
    """A checkpoint and the bundles made from it, kept in a folder between runs."""

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, options: argparse.Namespace, name: str, **checkpoint: Any) -> Workspace:
        """Take the checkpoint of the options, or make one of their shape with these overrides."""
        folder = options.work_dir / name
        if options.checkpoint is not None:
            return cls(folder / options.checkpoint.name, options.checkpoint)
        return cls.make(folder / options.shape, lambda partial: make_checkpoint(partial, options.shape, **checkpoint))

    @classmethod
    def make(cls, folder: Path, write_checkpoint: Callable[[Path], Path]) -> Workspace:
        """A workspace in a folder; its checkpoint is written where there is none yet."""
        finished = folder / "checkpoint"
        if not finished.exists():
            print("  making a checkpoint with random weights", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            # Renamed when whole, so that an interrupted run leaves nothing that the next one takes.
            write_checkpoint(folder / "partial").rename(finished)
        return cls(folder, finished)

    def bundle(self, name: str, settings: ExportSettings) -> Path:
        """The bundle of that name; exported again where the checkpoint or the code that writes it changed."""
        from hivtp.engines.bundle import Bundle
        from hivtp.export.checkpoint.folder import Checkpoint
        from hivtp.export.exporter import export_bundle
        from hivtp_ops.errors import BundleError

        folder = self.folder / re.sub(r"\W+", "-", name)
        try:
            bundle = Bundle.open(folder)
            is_current = (
                bundle.manifest.source["fingerprint"] == Checkpoint.open(self.checkpoint).fingerprint
                and (folder / MANIFEST_NAME).stat().st_mtime > _last_change()
            )
        except BundleError:
            is_current = False
        if not is_current:
            print(f"  exporting {name}", flush=True)
            export_bundle(self.checkpoint, folder, replace(settings, overwrite=True), is_quiet=True)
        return folder

    def bundles(self, settings: Mapping[str, ExportSettings]) -> dict[str, Path]:
        """The bundles of these names; those whose language model is rounded alike share one decoder."""
        folders: dict[str, Path] = {}
        decoders: dict[DecoderKind, Path] = {}
        for name, wanted in settings.items():
            kind = wanted.decoder
            source = None if kind is None else decoders.get(kind)
            folders[name] = self.bundle(name, replace(wanted, decoder_from=source))
            if kind is not None:
                decoders.setdefault(kind, folders[name])
        return folders


def builds_plans(device: str) -> bool:
    """Whether a library that builds plans is installed where there is a GPU to run them."""
    return device != "cpu" and any(importlib.util.find_spec(MODULES[name]) for name in PLAN_ENGINES)


def engines(bundle: Path, device: str) -> list[str]:
    """The engines that run the vision graph of a bundle on a device; what is left out is named with its reason.

    A TensorRT that is installed builds a plan first, where the bundle has none.
    """
    from hivtp.engines import cpu_engine, open_vision_engine
    from hivtp.engines.bundle import Bundle
    from hivtp.engines.tensorrt.plan import has_plans
    from hivtp.export.plan import PlanSettings, export_plan
    from hivtp_ops.errors import HivtpError

    opened, found = Bundle.open(bundle), []
    precision = opened.manifest.vision.precision
    if device == "cpu":
        return [cpu_engine(precision)]
    # The operators of an int8 graph are made for the CPU, and those of an fp8 graph for TensorRT.
    candidates = {"int8": (), "fp8": PLAN_ENGINES}.get(precision, get_args(GpuEngine))
    for name in candidates:
        try:
            if name in PLAN_ENGINES and not has_plans(opened, name):
                export_plan(bundle, PlanSettings(name), is_quiet=True)
            open_vision_engine(opened, name)
        except HivtpError as error:
            print(f"  {name} is left out for {bundle.name}: {error}", flush=True)
        else:
            found.append(name)
    return found


def _last_change() -> float:
    import hivtp.engines
    import hivtp.export
    import hivtp_ops

    folders = [Path(path) for part in (hivtp.engines, hivtp.export, hivtp_ops) for path in part.__path__]
    return max(file.stat().st_mtime for folder in folders for file in folder.glob("*.py"))
