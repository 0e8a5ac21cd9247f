"""What the scripts time: a checkpoint and its bundles, made once and kept between runs."""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import SHAPES, make_checkpoint
from hivtp.engines.bundle import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hivtp.export.decoder.build import DecoderKind
    from hivtp.export.settings import ExportSettings

WORK_DIR = Path(tempfile.gettempdir()) / "hivtp-benchmarks"


def add_options(parser: argparse.ArgumentParser, output: str, shape: str = "vit-l-0.3b") -> None:
    """Add the options that the scripts share.

    Args:
        parser: of the script.
        output: the default file of its results.
        shape: the default size of the checkpoint.
    """
    parser.add_argument("--checkpoint", type=Path, help="a LLaVA checkpoint (default: one with random weights)")
    parser.add_argument("--shape", choices=SHAPES, default=shape, help="sizes of what is made (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="keeps checkpoint and bundles between runs")
    parser.add_argument("--threads", type=int, default=2, help="threads of every system (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="results as JSON (default: %(default)s)")


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
    def open(
        cls,
        options: argparse.Namespace,
        name: str,
        write: Callable[..., Path] = make_checkpoint,
        **settings: Any,
    ) -> Workspace:
        """Take the checkpoint of the options, or the one of their shape, which is written where there is none yet.

        Args:
            options: of the command line.
            name: of a folder in the work directory.
            write: takes a folder, a shape and `settings`.
            **settings: what is special about the checkpoint.
        """
        if options.checkpoint is not None:
            return cls(options.work_dir / name / options.checkpoint.name, options.checkpoint)
        folder = options.work_dir / name / options.shape
        finished = folder / "checkpoint"
        if not finished.exists():
            print("  making a checkpoint with random weights", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            # Renamed when whole, so that an interrupted run leaves nothing that the next one takes.
            write(folder / "partial", options.shape, **settings).rename(finished)
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
            is_current = bundle.manifest.source.fingerprint == Checkpoint.open(self.checkpoint).fingerprint and (
                folder / MANIFEST_NAME
            ).stat().st_mtime > last_change(_exporting_code())
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


def last_change(folders: Iterable[Path]) -> float:
    """When a Python file in these folders, or deeper in them, was last written."""
    return max(file.stat().st_mtime for folder in folders for file in folder.rglob("*.py"))


def _exporting_code() -> list[Path]:
    import hivtp.engines
    import hivtp.export
    import hivtp_ops

    return [Path(path).resolve() for part in (hivtp.engines, hivtp.export, hivtp_ops) for path in part.__path__]
