"""Our bundles beside other systems on a CPU, each in its own process and environment: `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.foreign import ForeignWorker
from benchmarks.peers.systems import BUSY, GENAI, GOALS, OURS, PAIRS, open_ours
from benchmarks.speed.ttft import PROMPT, open_hugging_face
from benchmarks.timing.bundle_floors import Floors
from benchmarks.timing.floor import Peaks
from benchmarks.timing.harness import PAUSE_S, Results
from benchmarks.timing.hugging_face import UNPRUNED
from benchmarks.timing.peaks import NAME, RATES, in_words, open_peaks
from benchmarks.timing.record import Row, report
from benchmarks.timing.worker import System, Worker
from benchmarks.timing.workspace import Workspace, add_length, add_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
QUANTITIES = {"ttft_ms": "time to first token", "decode_ms_per_token": "decode per token", "vision_ms": "vision"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "peers.json")
    add_length(parser, 16)
    parser.add_argument("--genai", type=Path, metavar="PYTHON", help="of an environment with openvino-genai and nncf")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images for GenAI's 8-bit vision")
    parser.add_argument("--only", nargs="*", help="names of our systems, to measure fewer")
    parser.add_argument("--no-hugging-face", action="store_true", help="leave it out; it takes the most memory")
    options = parser.parse_args(arguments)
    workspace = Workspace.open(options, "peers")
    chosen = {name: system for name, system in OURS.items() if options.only is None or name in options.only}
    bundles = workspace.bundles({name: system.export for name, system in chosen.items()})
    with contextlib.ExitStack() as stack:
        workers: list[Worker | ForeignWorker] = []
        for worker in _workers(options, workspace, bundles):
            print(f"  loading {worker.name}", flush=True)
            workers.append(stack.enter_context(contextlib.closing(worker)))
            worker.wait_until_ready()
        found, loads = _in_turns(workers, options.rounds)
    _report(options, workspace, bundles, found, {"load_average": loads, "peers": _versions(workers)})


def _workers(
    options: argparse.Namespace, workspace: Workspace, bundles: Mapping[str, Path]
) -> Iterator[Worker | ForeignWorker]:
    length = {"num_new_tokens": options.new_tokens}
    yield Worker(System(NAME, open_peaks), options.threads)
    if not options.no_hugging_face:
        yield Worker(
            System(UNPRUNED, open_hugging_face, {"checkpoint": workspace.checkpoint, **length}), options.threads
        )
    for name, folder in bundles.items():
        arguments = {"bundle": folder, "name": name, **length}
        yield Worker(System(name, open_ours, arguments), options.threads)
    for name, (precision, is_vision_w8a8) in GENAI.items() if options.genai is not None else ():
        folder = _genai_folder(options, workspace, precision, is_vision_w8a8=is_vision_w8a8)
        settings = ["--threads", str(options.threads), "--new-tokens", str(options.new_tokens), "--prompt", PROMPT]
        program = str(HERE / "openvino_genai_worker.py")
        yield ForeignWorker(name, [str(options.genai), program, str(folder), *settings])


def _genai_folder(options: argparse.Namespace, workspace: Workspace, precision: str, *, is_vision_w8a8: bool) -> Path:
    """The checkpoint as GenAI takes it, converted once and kept."""
    parent = workspace.folder / "genai"
    finished = parent / (f"{precision}-vision-w8a8" if is_vision_w8a8 else precision)
    if not finished.exists():
        photos = ["--vision-w8a8", *map(str, options.photos)] if is_vision_w8a8 else []
        partial = parent / f"{finished.name}.partial"
        program = str(HERE / "openvino_genai_export.py")
        command = [str(options.genai), program, str(workspace.checkpoint), str(partial), precision, *photos]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
        partial.rename(finished)
    return finished


def _in_turns(workers: Sequence[Worker | ForeignWorker], num_rounds: int) -> tuple[Results, list[float]]:
    """Rounds after one that warms up; some systems also decode while another process takes a core."""
    samples: dict[str, list[Any]] = {worker.name: [] for worker in workers}
    other_cores, loads = [], []
    for number in range(num_rounds + 1):
        others, started = 0.0, time.perf_counter()
        for worker in workers:
            time.sleep(PAUSE_S)
            sample, core_s = worker.sample()
            others += core_s
            if worker.name in BUSY and number > 0:
                with _foreign_load():
                    sample |= {f"busy_{name}": value for name, value in worker.sample()[0].items()}
            samples[worker.name].append(sample)
        other_cores.append(others / (time.perf_counter() - started))
        loads.append(os.getloadavg()[0])
        print(f"  round {number}: load average {loads[-1]:.1f}", flush=True)
    return Results({name: found[1:] for name, found in samples.items()}, other_cores[1:]), loads[1:]


@contextlib.contextmanager
def _foreign_load() -> Iterator[None]:
    """Another process takes a core meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(PAUSE_S)
        yield
    finally:
        process.kill()
        process.wait()


def _report(
    options: argparse.Namespace,
    workspace: Workspace,
    bundles: Mapping[str, Path],
    found: Results,
    about: Mapping[str, Any],
) -> None:
    peak_samples = {NAME: found.samples[NAME]}
    found = Results({name: samples for name, samples in found.samples.items() if name != NAME}, found.other_cores)
    peaks = Peaks(**{rate: max(sample[rate] for sample in peak_samples[NAME]) for rate in RATES})
    floors = Floors(workspace.checkpoint, peaks)
    tables: dict[str, list[Row]] = {}
    for name, (peer, kind) in PAIRS.items():
        if not {name, peer} <= found.samples.keys():
            continue
        for quantity, title in QUANTITIES.items():
            rows = tables.setdefault(f"{title}, beside {peer}", [Row.of(found, peer, quantity, peer)])
            floor = _floor(floors, bundles[name], found, name, quantity)
            rows.append(Row.of(found, name, quantity, peer, GOALS.get((kind, quantity)), floor))
    for name in BUSY:
        if name in found.samples:
            busy, quiet = (found.values(name, f"{part}decode_ms_per_token") for part in ("busy_", ""))
            goal = GOALS[("busy", "decode_ms_per_token")] if name in OURS else None
            tables.setdefault("decode per token with a foreign core of load, beside without", []).append(
                Row(name, busy, quiet, goal)
            )
    report(options, tables, {"peaks": Results(peak_samples, found.other_cores), "peers": found}, about)
    print(in_words(Results(peak_samples, found.other_cores)))


def _floor(floors: Floors, folder: Path, found: Results, name: str, quantity: str) -> float | None:
    if "openvino" in name or "num_text_tokens" not in found.samples.get(UNPRUNED, [{}])[0]:
        # Floors are those of ONNX Runtime's arithmetic.
        return None
    num_tokens = found.first(UNPRUNED, "num_text_tokens") + found.first(name, "num_kept_tokens")
    if quantity == "ttft_ms":
        return floors.ttft_ms(folder, num_tokens)
    if quantity == "vision_ms":
        return floors.vision_ms(folder)
    return floors.decode_ms_per_token(folder, num_tokens, found.first(name, "num_new_tokens"))


def _versions(workers: Sequence[Worker | ForeignWorker]) -> dict[str, Any]:
    return {worker.name: worker.about for worker in workers if isinstance(worker, ForeignWorker)}


if __name__ == "__main__":
    main()
