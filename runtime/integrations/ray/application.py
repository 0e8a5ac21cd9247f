"""The deployments, and how they are put together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.ray.gateway import Gateway
from hivtp.runtime.integrations.ray.replica import Replica
from hivtp.runtime.integrations.ray.vision import VisionReplica, num_tiles
from hivtp_ops.errors import MissingExtraError

if TYPE_CHECKING:
    from hivtp.runtime.integrations.ray.settings import RaySettings

SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# Of a gateway: it waits for replicas most of the time.
GATEWAY_REQUESTS = 1000


def create_application(settings: RaySettings) -> Any:
    """Gateways, replicas of the server, and vision stages where they are apart.

    Raises:
        MissingExtraError: Ray Serve is not installed.
    """
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error

    server = settings.server_settings
    replica: Any = serve.deployment(
        Replica,
        name="hivtp",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_requests or server.num_slots,
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
        },
        # What the server of a replica takes in, slots and queue; the rest waits in the gateways.
        max_ongoing_requests=server.num_slots + server.max_queued,
        max_queued_requests=max(1, server.max_queued * settings.max_replicas),
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        graceful_shutdown_timeout_s=settings.max_shutdown_seconds,
        request_router_config=RequestRouterConfig(request_router_class=SESSION_ROUTER),
    )
    gateway: Any = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=settings.num_gateways,
        max_ongoing_requests=GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": settings.gateway_cpus},
        graceful_shutdown_timeout_s=settings.max_shutdown_seconds,
    )
    vision = [_vision(settings)] if settings.vision_replicas else []
    return gateway.bind(settings, replica.bind(settings, *vision))


def _vision(settings: RaySettings) -> Any:
    from ray import serve

    options = settings.vision_options
    # Whoever calls puts this many tiles into one call at most.
    max_tiles = max(settings.max_tiles_per_batch, options.max_tiles_per_run)
    batch: Any = serve.batch(
        max_batch_size=max_tiles, batch_wait_timeout_s=settings.batch_seconds, batch_size_fn=num_tiles
    )

    class BatchingVision(VisionReplica):
        """Puts the tiles of several requests into one run of the graph."""

        async def describe(self) -> dict[str, Any]:
            """What a replica must know of the engine."""
            return self.about

    async def encode(vision: VisionReplica, requests: list[Any]) -> list[Any]:
        return await asyncio.to_thread(vision.run, requests)

    BatchingVision.encode = batch(encode)  # type: ignore[attr-defined]  # one request in, its answer out
    deployment: Any = serve.deployment(
        BatchingVision,
        name="vision",
        num_replicas=settings.vision_replicas,
        ray_actor_options={"num_cpus": settings.vision_cpus, "num_gpus": settings.vision_gpus},
    )
    return deployment.bind(settings)
