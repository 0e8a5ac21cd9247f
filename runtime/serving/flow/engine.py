"""The engine thread: it alone owns the scheduler, takes jobs as they come, and tells what becomes of them."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from hivtp.runtime.attempt import attempt
from hivtp.runtime.language import open_scheduler
from hivtp.runtime.language.scheduler import SchedulerOptions
from hivtp.runtime.serving.flow.job import Begun, Failed, Job
from hivtp.runtime.serving.flow.memory import KvMemory
from hivtp.runtime.serving.flow.warm_up import warm_up_decoder
from hivtp.runtime.serving.protocol.errors import ApiError
from hivtp.runtime.serving.telemetry.logs import log, where
from hivtp_ops.errors import HivtpError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from hivtp.runtime.model import Model
    from hivtp.runtime.serving.flow.job import Event
    from hivtp.runtime.serving.settings import ServerSettings

    Deliver: TypeAlias = Callable[[Sequence[tuple[Job, Event]]], None]


@dataclass(frozen=True)
class _Command:
    """What the engine's thread is asked for.

    Attributes:
        job: which is added, or else given up.
        is_new: which of both.
    """

    job: Job
    is_new: bool


@dataclass(frozen=True)
class EngineState:
    """What the scheduler is at, as it was after its last run.

    Attributes:
        num_waiting, num_running: jobs without and with a slot.
        kv_share: of the KV budget that running jobs may come to need, 0 to 1.
    """

    num_waiting: int = 0
    num_running: int = 0
    kv_share: float = 0.0


class Engine:
    """Runs jobs.

    Args:
        model: decodes.
        settings: slots, memory and chunks.
        deliver: takes what happened in one run of the decoder, in the engine's thread.

    Attributes:
        max_positions: of a prompt and its answer together.
        state: how full it is.

    Raises:
        OutOfMemoryError: there is no memory for the slots.
        SettingsError: not even a short request would fit.
    """

    def __init__(self, model: Model, settings: ServerSettings, deliver: Deliver) -> None:
        self.state = EngineState()
        self._kv = kv = KvMemory.of(model.language, settings)
        self.max_positions = kv.max_positions
        manifest = model.bundle.manifest.language
        has_prefill_decoder = manifest is not None and manifest.decoder is not None and manifest.decoder.prefill_file
        options = SchedulerOptions(
            num_slots=settings.num_slots,
            capacity=self.max_positions,
            chunk_size=settings.chunk_size,
            steps_per_chunk=settings.steps_per_chunk,
            max_kv_bytes=kv.max_bytes,
            # An answer must not depend on what was asked before it.
            keeps_slots=settings.reuses_prefix and not has_prefill_decoder,
        )
        self._scheduler = open_scheduler(model.language, options)
        self._language = model.language
        self._idle_seconds = settings.idle_seconds
        self._deliver = deliver
        self._happened: list[tuple[Job, Event]] = []
        self._jobs: set[Job] = set()
        # None ends the thread.
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        self._lock = Lock()
        self._is_warm = self._is_dead = False
        self._thread = Thread(target=self._run, name="hivtp-engine", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether it has run once, and takes jobs."""
        return self._is_warm and not self._is_dead

    @property
    def is_dead(self) -> bool:
        """Whether its thread has ended."""
        return self._is_dead

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Give up all jobs, and wait for the run that is on its way."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def emit(self, job: Job, event: Event) -> None:
        """Note what happened to a job; called in the engine's thread."""
        if isinstance(event, Begun):
            # At once: the run of its prompt may take long, and the job no longer waits for others.
            self._deliver([(job, event)])
        else:
            self._happened.append((job, event))

    def submit(self, job: Job) -> None:
        """Take a job into the queue.

        Raises:
            ApiError: the engine is dead.
        """
        with self._lock:
            if self._is_dead:
                raise dead_error()
            self._commands.put(_Command(job, is_new=True))

    def cancel(self, job: Job) -> None:
        """Give a job up, wherever it is; one that has ended is left alone."""
        self._commands.put(_Command(job, is_new=False))

    def _run(self) -> None:
        try:
            warm_up_decoder(self._scheduler, self._language, self.max_positions)
            self._is_warm = True
            is_busy = False
            while self._obey(is_busy):
                is_busy = self._scheduler.step()
                self._report()
            self._die(ApiError(503, "the server is shutting down", "shutting_down", retry_after=1))
        except BaseException as error:  # noqa: BLE001  no request does this: it is a fault of the server
            log(logging.CRITICAL, "engine_died", error=where(error))
            self._die(dead_error())

    def _obey(self, is_busy: bool) -> bool:
        """Carry out what was asked for, after waiting for it where there is nothing to do; whether to go on."""
        with contextlib.suppress(Empty):
            command = self._commands.get_nowait() if is_busy else self._wait()
            while command is not None:
                if command.is_new:
                    self._add(command.job)
                else:
                    self._give_up(command.job)
                command = self._commands.get_nowait()
            return False
        return True

    def _wait(self) -> _Command | None:
        """The next command; when it is long in coming, the memory of slots that are kept goes back to the system."""
        try:
            return self._commands.get(timeout=self._idle_seconds)
        except Empty:
            self._scheduler.forget()
            return self._commands.get()

    def _add(self, job: Job) -> None:
        self._jobs.add(job)
        error = attempt(self._scheduler.add, job)
        if isinstance(error, HivtpError):
            job.fail(error)

    def _give_up(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.discard(job)
            self._scheduler.cancel(job)

    def _report(self) -> None:
        """Say what happened in a run."""
        scheduler = self._scheduler
        reserved = sum(job.num_positions for job in self._jobs if job.begun_at is not None and job.ended_at is None)
        self.state = EngineState(scheduler.num_waiting, scheduler.num_running, self._kv.share(reserved))
        happened, self._happened = self._happened, []
        self._jobs.difference_update(job for job, _ in happened if job.ended_at is not None)
        if happened:
            self._deliver(happened)

    def _die(self, error: ApiError) -> None:
        """Take no more jobs, and fail those that there are."""
        with self._lock:
            self._is_dead = True
            while not self._commands.empty():
                command = self._commands.get()
                if command is not None and command.is_new:
                    self._jobs.add(command.job)
        self.state = EngineState()
        self._deliver([(job, Failed(error)) for job in self._jobs])
        self._jobs.clear()


def dead_error() -> ApiError:
    """The error of a request that a dead engine cannot answer."""
    return ApiError(
        503, "the engine of this server has failed; it must be started again", "engine_dead", retry_after=30
    )
