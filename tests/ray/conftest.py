"""Tests that need Ray Serve, in an environment of their own: `make ray` makes it and runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.timing.vllm_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_STARTS = 4
ROOT = Path(__file__).parents[2]
# Fractions, so that all fit onto two cores.
SMALL = {"num_cpus": 0.1, "gateway_cpus": 0.1, "vision_cpus": 0.1, "threads": 1}


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A cluster of one node, and the URL of its proxy."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    env_vars = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for num_left in reversed(range(NUM_STARTS)):
        port = free_port()
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env_vars})
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            break
        except Exception:
            # Its processes get 30 seconds each, which a busy machine does not always give them.
            ray.shutdown()
            if not num_left:
                raise
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def deploy(cluster: str) -> Callable[..., str]:
    """Deploys an app, in place of the one before it."""

    def run(bundle: Path, **args: Any) -> str:
        from ray import serve

        from hivtp.runtime.integrations.ray import build_app

        serve.run(build_app({"bundle": str(bundle), **SMALL, **args}), name="hivtp", route_prefix="/")
        return cluster

    return run
