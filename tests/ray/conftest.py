"""Tests that need Ray Serve, in an environment of their own: `make ray` makes it and runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.timing.vllm_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
# Fractions, so that all fit onto two cores.
SMALL = {"num_cpus": 0.1, "gateway_cpus": 0.1, "vision_cpus": 0.1, "threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of one node, and the URL of its proxy."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def deploy(cluster: str) -> Callable[..., str]:
    """Deploys an app, in place of the one before it."""

    def run(bundle: Path, **args: Any) -> str:
        from ray import serve

        from hivtp.runtime.integrations.ray import build_app

        serve.run(build_app({"bundle": str(bundle), **SMALL, **args}), name="hivtp", route_prefix="/")
        return cluster

    return run
