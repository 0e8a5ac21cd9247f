"""One request to the server and its answer, and how far they have come."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hivtp.runtime.serving.protocol.reply import Usage

if TYPE_CHECKING:
    from hivtp.runtime.serving.flow.admission import Held
    from hivtp.runtime.serving.flow.job import Job
    from hivtp.runtime.serving.flow.stages import Work


@dataclass
class Exchange:
    """One request and its answer.

    Attributes:
        held: its bytes that wait.
        deadline: when it must be answered, by the clock of the event loop.
        id: tells answers apart.
        arrived_at: as `time.perf_counter` reads.
        created: the same in seconds since 1970.
        waited_seconds: for others.
        work: what was read and prepared; None until then.
        job: what is decoded; None until then.
    """

    held: Held
    deadline: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived_at: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    waited_seconds: float = 0.0
    work: Work | None = None
    job: Job | None = None

    @property
    def usage(self) -> Usage:
        """What it took so far; it has a job."""
        assert self.job is not None, "a request has counts when it is in the engine"
        images = self.job.prompt.images
        return Usage(
            num_prompt_tokens=self.job.num_prompt_tokens,
            num_cached_tokens=self.job.num_cached,
            num_image_tokens=sum(image.num_unpruned_tokens for image in images),
            num_kept_tokens=sum(len(image.embeds) for image in images),
            num_new_tokens=self.job.num_new_tokens,
        )
