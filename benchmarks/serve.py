"""`hivtp serve` under load, with and without batching, and other servers beside it: `python -m benchmarks.serve`.

Requests come by a Poisson clock at multiples of the capacity, which is measured first by clients that ask as fast as
they are answered. The same requests at the same times go to each system, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.figures import Figures, Goals, table
from benchmarks.serving.load import offer, saturate
from benchmarks.serving.process import HivtpServer, Target
from benchmarks.serving.traffic import Traffic, arrivals
from benchmarks.speed.ttft import BUNDLES, QUANTIZED
from benchmarks.timing.record import write
from benchmarks.timing.table import aligned
from benchmarks.timing.workspace import Workspace, add_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    # By system.
    Load: TypeAlias = Mapping[str, Figures]

BATCHED, ONE_SLOT = "hivtp", "hivtp, one slot"
QUEUE_SECONDS = 30.0
# More than there are slots, so that none is ever without work.
NUM_CLIENTS = 6
MAX_GROWTH_BYTES = 64 * 2**20


def options_from(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "serve.json")
    parser.add_argument("--bundle", type=Path, help="serve this one (default: int8 / int4, preset 192, made)")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 1, 2, 4], help="times the capacity")
    parser.add_argument("--seconds", type=float, default=120, help="of each load (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=500, help="distinct ones for the memory, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--ttft-goal", type=float, default=5, help="seconds, of a good answer (default: %(default)s)")
    parser.add_argument("--gap-goal", type=float, default=0.3, help="seconds between tokens (default: %(default)s)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL[=PID]", help="another server, started already"
    )
    return parser.parse_args(arguments)


def peers(given: Sequence[str]) -> list[Target]:
    """Servers that were started elsewhere."""
    found = []
    for words in given:
        name, url, *pid = words.split("=")
        found.append(Target(name, url, int(pid[0]) if pid else None))
    return found


async def measure_capacity(server: Target, seconds: float) -> tuple[float, float]:
    """Answers per second of a server that always has work, and the load average meanwhile."""
    traffic = Traffic(seed=1)
    # All are drawn before, since drawing takes the time of the cores that are measured.
    requests = [traffic.request() for _ in range(int(20 * seconds))]
    asked = itertools.cycle(requests)
    await saturate(server, asked, NUM_CLIENTS, min(10.0, seconds))
    run = await saturate(server, asked, NUM_CLIENTS, seconds)
    return sum(one.is_answered for one in run.exchanges) / run.seconds, run.load_average


async def measure_memory(server: Target, num_images: int) -> dict[str, Any]:
    """Resident memory while distinct images come, without the embeddings that the cache of images holds."""
    traffic = Traffic(seed=7)
    sizes = []
    for _ in range(0, num_images, 20):
        requests = iter([traffic.image_request(2) for _ in range(20)])
        run = await saturate(server, requests, 4, float("inf"))
        assert all(one.is_answered for one in run.exchanges), "every image is answered"
        sizes.append((server.resident_bytes or 0) - int((await server.metrics()).get("mm_cache_bytes", 0)))
    # The first fifth is for what each engine keeps for its next run.
    settled = sizes[len(sizes) // 5 :]
    return {"num_images": num_images, "resident_bytes": sizes, "growth_bytes": settled[-1] - settled[0]}


async def measure_load(targets: Sequence[Target], rate: float, options: argparse.Namespace, seed: int) -> Load:
    """Offer the same requests at the same times to one system after the other.

    Args:
        targets: the systems.
        rate: requests per second.
        options: of the command line.
        seed: of the requests and their times.
    """
    times = list(arrivals(rate, options.seconds, seed))
    traffic = Traffic(100 + seed)
    requests = [traffic.request() for _ in times]
    goals = Goals(options.ttft_goal, options.gap_goal)
    return {target.name: Figures.of(await offer(target, requests, times), goals) for target in targets}


async def measure_all(options: argparse.Namespace, bundle: Path) -> tuple[dict[str, Any], list[str]]:
    """All loads; what was found, and what our servers must hold to and did not."""
    results: dict[str, Any] = {"goals": asdict(Goals(options.ttft_goal, options.gap_goal)), "loads": []}
    faults: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        ours = [HivtpServer(BATCHED, bundle, options.threads)]
        # It holds as many requests, so that it refuses no sooner.
        ours.append(HivtpServer(ONE_SLOT, bundle, options.threads, ["--slots=1", "--max-queued=19"]))
        for server in ours:
            await stack.enter_async_context(server)
        targets: list[Target] = [*ours, *peers(options.peer)]
        results["capacity"] = capacity = {}
        for target in targets if options.rates else ():
            rate, load_average = await measure_capacity(target, min(60.0, options.seconds))
            capacity[target.name] = {"answers_per_s": rate, "load_average": load_average}
            print(f"{target.name}: {rate:.2f} answers/s, load average {load_average:.1f}", flush=True)
        for seed, multiple in enumerate(options.rates):
            found = await measure_load(targets, multiple * capacity[BATCHED]["answers_per_s"], options, seed)
            systems = {name: one.to_dict() for name, one in found.items()}
            results["loads"].append({"multiple": multiple, "systems": systems})
            print(f"\n{aligned(table(f'{multiple:g} x capacity', found))}", flush=True)
            for server in ours:
                faults += [
                    f"{server.name} at {multiple:g}: {words}" for words in found[server.name].faults(QUEUE_SECONDS)
                ]
        if options.images:
            results["memory"] = memory = await measure_memory(ours[0], options.images)
            growth = memory["growth_bytes"] / 2**20
            print(f"\nmemory grew by {growth:.1f} MiB over the last four fifths of {options.images} images")
            if memory["growth_bytes"] > MAX_GROWTH_BYTES:
                faults.append("memory grew with the images seen")
    return results, faults


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report; exit code 1 where the server did not hold to what it must."""
    options = options_from(arguments)
    bundle = options.bundle or Workspace.open(options, "answers").bundle(QUANTIZED, BUNDLES[QUANTIZED])
    results, faults = asyncio.run(measure_all(options, bundle))
    write(options, {**results, "faults": faults})
    print("\n".join(faults) or "nothing lost, no first token too late, no lag, no growth")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
