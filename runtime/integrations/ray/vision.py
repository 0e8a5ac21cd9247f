"""A vision stage that several replicas share: tiles of all of them go through the graph together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hivtp.runtime.integrations.ray.settings import RaySettings

# A call waits for a batch and for its turn.
MAX_SECONDS = 120.0


class VisionReplica:
    """Runs the vision graph of a bundle; `create_application` puts its calls together.

    Args:
        settings: which bundle, and how it runs.
    """

    def __init__(self, settings: RaySettings) -> None:
        from hivtp.engines import open_vision_engine
        from hivtp.engines.bundle import Bundle
        from hivtp.runtime.hub.bundle import bundle_folder

        options = settings.vision_options
        bundle = Bundle.open(bundle_folder(settings.bundle, None))
        self._engine = open_vision_engine(bundle, options.engine, options.engine_settings)
        engine = self._engine
        self.about = {
            "description": engine.description,
            "output_names": engine.output_names,
            "max_tiles": engine.max_tiles,
        }

    def run(self, requests: Sequence[dict[str, np.ndarray[Any, Any]]]) -> list[dict[str, np.ndarray[Any, Any]]]:
        """Run the graph on the tiles of several requests, each as if it were alone."""
        if len(requests) == 1:
            return [self._engine.run(request) for request in requests]
        names = list(requests[0])
        together = self._engine.run({name: np.concatenate([request[name] for request in requests]) for name in names})
        ends = np.cumsum([len(request["pixel_values"]) for request in requests])
        parts = {name: np.split(array, ends[:-1]) for name, array in together.items()}
        return [{name: parts[name][place] for name in parts} for place in range(len(requests))]


def num_tiles(requests: Sequence[dict[str, np.ndarray[Any, Any]]]) -> int:
    """Tiles of a batch."""
    return sum(len(request["pixel_values"]) for request in requests)


class RemoteVision:
    """An Engine that is a handle of VisionReplica. Threads may use it, the event loop of a replica must not.

    Args:
        handle: of Ray.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        about = handle.describe.remote().result(timeout_s=MAX_SECONDS)
        self.description: str = about["description"]
        self.output_names: tuple[str, ...] = tuple(about["output_names"])
        self.max_tiles: int | None = about["max_tiles"]

    def run(self, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """See Engine.run."""
        try:
            found: dict[str, np.ndarray[Any, Any]] = self._handle.encode.remote(dict(inputs)).result(
                timeout_s=MAX_SECONDS
            )
        except Exception as error:
            raise EngineError(f"the shared vision stage failed: {type(error).__name__}: {error}") from error
        return found
