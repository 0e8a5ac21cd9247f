"""A replica: a whole server of a bundle, whose calls come from a gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hivtp.runtime.integrations.ray.calls import answer_call

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hivtp.runtime.integrations.ray.calls import AnswerPart, HttpCall
    from hivtp.runtime.integrations.ray.settings import RaySettings


class Replica:
    """See `create_application`.

    Args:
        settings: how it is set up.
        vision: a handle of the shared vision stage; None where the replica has its own.
    """

    async def __init__(self, settings: RaySettings, vision: Any = None) -> None:  # type: ignore[misc]  # Ray awaits it
        from hivtp.runtime.serving.app import create_app

        pipeline = await asyncio.to_thread(_load, settings, vision)
        self._app = create_app(pipeline.model, settings.server_settings)
        await self._app.service.start()

    async def call(self, call: HttpCall) -> AsyncGenerator[AnswerPart]:
        """Answer a call."""
        async for part in answer_call(self._app, call):
            yield part

    def check_health(self) -> None:
        """Ray starts another replica where this raises."""
        if self._app.service.state == "failed":
            raise RuntimeError("the engine of this replica has failed")


def _load(settings: RaySettings, vision: Any) -> Any:
    from hivtp.runtime.integrations.ray.vision import RemoteVision
    from hivtp.runtime.pipeline import Pipeline

    engine = None if vision is None else RemoteVision(vision)
    return Pipeline.load(
        settings.bundle, vision=settings.vision_options, language=settings.language_options, vision_engine=engine
    )
