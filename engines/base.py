"""What every engine offers: one graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from hivtp_ops.errors import SettingsError

# More than any machine has use for; each thread costs memory and time to start.
MAX_THREADS = 512

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs a graph.

    Attributes:
        num_threads: threads of one run on the CPU; None leaves the choice to the engine (the physical cores).
        uses_cuda_graph: on a GPU, record the second run of each number of tiles and replay it from then on. It saves
            the time to launch kernels one by one, and costs memory for each number of tiles.
    """

    num_threads: int | None = None
    uses_cuda_graph: bool = False

    def __post_init__(self) -> None:
        number: Any = self.num_threads
        if number is None:
            return
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_THREADS:
            raise SettingsError(f"num_threads must be a whole number from 1 to {MAX_THREADS}, not {number!r}")


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
