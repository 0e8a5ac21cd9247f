"""Plans in a bundle: written beside their sidecars, and read where they fit and this machine built them."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

from hivtp.engines.bundle import PLANS_FOLDER
from hivtp.engines.files import read_regular, write_whole
from hivtp.engines.tensorrt.plan_record import PlanRecord
from hivtp.engines.tensorrt.trust import is_own_plan, remember_plan
from hivtp_ops.errors import BundleError, EngineError, EngineWarning, HivtpError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.engines.bundle import Bundle
    from hivtp.engines.gpu import Gpu
    from hivtp.engines.manifest import FileRecord
    from hivtp.engines.tensorrt.library import Library

MAX_SIDECAR_BYTES = 2**20


def graph_hashes(bundle: Bundle) -> dict[str, str]:
    """The sha256 of each file of the bundle's vision graph, as the manifest has them."""
    name = bundle.manifest.vision.file
    files = bundle.manifest.files
    return {path: record.sha256 for path, record in files.items() if path in (name, f"{name}.data")}


def sha256_of_plan(content: bytes | memoryview) -> str:
    """The sha256 of a plan in memory, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def has_plans(bundle: Bundle, library: str) -> bool:
    """Whether the bundle holds a plan for a library, fitting or not."""
    return bool(_sidecars(bundle, library))


def write_plan(bundle: Bundle, record: PlanRecord, content: memoryview) -> Path:
    """Put a plan into a bundle, in the place of one that was built before for the same machine.

    Returns:
        The plan's file; its sidecar lies beside it.

    Raises:
        BundleError: it cannot be written; no half of it is left.
    """
    sidecar = bundle.folder / PLANS_FOLDER / f"{record.stem}.json"
    file = sidecar.with_suffix(".plan")
    bundle.check_inside(PLANS_FOLDER)
    try:
        sidecar.parent.mkdir(exist_ok=True)
        # Without its sidecar a plan does not count, so that at no time the two of different builds stand together.
        sidecar.unlink(missing_ok=True)
        write_whole(file, content)
        write_whole(sidecar, record.to_json().encode())
    except OSError as error:
        raise BundleError(f"cannot write the plan {file}: {error}; free some space or copy the bundle") from error
    try:
        remember_plan(record.plan.sha256)
    except OSError as error:
        warnings.warn(
            f"cannot record that this machine built the plan ({error}); to load it, say trust_plans=True "
            "(--trust-plans)",
            EngineWarning,
            stacklevel=2,
        )
    return file


def read_plan(
    bundle: Bundle, library: Library, gpu: Gpu | None, *, trust_plans: bool = False
) -> tuple[PlanRecord, bytes]:
    """Find the plan of a bundle that fits this machine, and read it.

    A plan is code, so it is read only where this machine built it, by a record outside the bundle, or where the caller
    trusts it. The hash that is checked is that of the very bytes that are returned.

    Args:
        bundle: an opened bundle.
        library: would run the plan.
        gpu: of this machine.
        trust_plans: also take one that this machine did not build.

    Raises:
        EngineError: no plan can be used, with the reason for each that was found, and how to build one.
    """
    # Where there is no GPU, another plan would not help.
    advice = f"; build one with: hivtp plan {bundle.folder} --engine {library.name}" if gpu else ""
    reasons = []
    for sidecar in _sidecars(bundle, library.name):
        try:
            bundle.check_inside(f"{PLANS_FOLDER}/{sidecar.name}")
            record = PlanRecord.from_json(read_regular(sidecar, MAX_SIDECAR_BYTES))
            record.check_fits(library, gpu, graph_hashes(bundle))
            if not trust_plans and not is_own_plan(record.plan.sha256):
                raise EngineError(
                    "was not built by this machine, and a plan is code: say trust_plans=True (--trust-plans) if you "
                    "trust who built it"
                )
            bundle.check_inside(f"{PLANS_FOLDER}/{sidecar.stem}.plan")
            return record, _read_whole(sidecar.with_name(f"{sidecar.stem}.plan"), record.plan)
        except HivtpError as error:
            reasons.append(f"{sidecar.stem} {error}")
        except OSError as error:
            reasons.append(f"{sidecar.stem} cannot be read: {error}")
    if not reasons:
        raise EngineError(f"the bundle {bundle.folder} holds no plan for {library.name}{advice}")
    raise EngineError(f"no plan of the bundle {bundle.folder} fits: {'; '.join(reasons)}{advice}")


def _sidecars(bundle: Bundle, library: str) -> list[Path]:
    # "tensorrt-rtx-1.7..." begins with "tensorrt-" too; a version begins with a digit.
    return sorted((bundle.folder / PLANS_FOLDER).glob(f"{library}-[0-9]*.json"))


def _read_whole(file: Path, expected: FileRecord) -> bytes:
    num_bytes = file.stat().st_size
    if num_bytes != expected.num_bytes:
        raise EngineError(f"has {num_bytes} bytes instead of {expected.num_bytes}: it is truncated or altered")
    content = read_regular(file, num_bytes)
    if sha256_of_plan(content) != expected.sha256:
        raise EngineError("was altered: its sha256 differs from its sidecar's. A plan holds code, so it is not loaded")
    return content
