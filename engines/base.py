"""What every engine offers: one graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from hivtp.engines.view import View

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs a graph.

    Attributes:
        num_threads: threads of one run on the CPU; None leaves the choice to the engine (the physical cores).
        uses_cuda_graph: on a GPU, record the second run of each number of tiles and replay it from then on. It saves
            the time to launch kernels one by one, and costs memory for each number of tiles.
        is_compiled: in torch, run the graph through torch.compile: the first run of each number of tiles takes up to a
            minute, and the others less time.
    """

    num_threads: int | None = None
    uses_cuda_graph: bool = False
    is_compiled: bool = False

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise EngineError(f"num_threads must be at least 1, not {self.num_threads}")


Device = Literal["cuda", "cpu"]


class Engine(Protocol):
    """Runs one graph. Several threads may call `run` at once."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order."""

    @property
    def max_tiles(self) -> int | None:
        """The largest first dimension of the inputs that it takes; None where any will do."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run the graph.

        Args:
            inputs: an array for every input, in the dtype and shape that the graph declares.

        Returns:
            Every output by name.

        Raises:
            EngineError: the inputs do not fit, or the engine failed.
        """


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that can leave an output where it was computed."""

    @property
    def view_device(self) -> Device | None:
        """The device in whose memory it can leave an output; "cpu" stands in for one; None where it cannot."""

    def run_keeping(self, inputs: Arrays, kept: str) -> tuple[View, dict[str, np.ndarray[Any, Any]]]:
        """Run the graph, and wait for it.

        Args:
            inputs: as in Engine.run.
            kept: an output that stays on the device. It is the caller's: no further run changes it.

        Returns:
            That output, and all others by name.

        Raises:
            EngineError: the inputs do not fit, or the engine failed.
        """
