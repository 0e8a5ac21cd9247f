"""What every engine offers: one graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from hivtp_ops.errors import SettingsError

# More than any machine has use for; each thread costs memory and time to start.
MAX_THREADS = 512

Arrays = Mapping[str, np.ndarray[Any, Any]]
# In which an engine computes, where it lets one choose.
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs a graph.

    Attributes:
        num_threads: threads of one run on the CPU; None leaves the choice to the engine (the physical cores).
        uses_cuda_graph: on a GPU, record the second run of each number of tiles and replay it from then on. It saves
            the time to launch kernels one by one, and costs memory for each number of tiles.
        precision: of OpenVINO: "float32" computes in float32; "auto" in bfloat16 where the processor has instructions
            for it, except for what decides which patches are kept; "bfloat16" everything. Weights stay as the graph
            has them.
    """

    num_threads: int | None = None
    uses_cuda_graph: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise SettingsError(f"precision must be one of {', '.join(get_args(Precision))}, not {self.precision!r}")
        number: Any = self.num_threads
        if number is None:
            return
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_THREADS:
            raise SettingsError(f"num_threads must be a whole number from 1 to {MAX_THREADS}, not {number!r}")


Device = Literal["cuda", "cpu"]


class Engine(Protocol):
    """Runs one graph. Several threads may call `run` at once."""

    @property
    def description(self) -> str:
        """What runs the graph, for people, and in which precision where that is not the graph's."""

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
