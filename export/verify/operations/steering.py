"""A PyTorch module that runs on the values of a graph: every operation is compared on the same inputs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from numpy.typing import NDArray

# What was compared. "operation": normalisation, attention, activation, sum: what no precision rounds to 8 bits.
# "product": a linear layer, on what it multiplies. "blocks": one whose kernel rounds what it multiplies, in blocks.
# "rounding": what it multiplies, with what it is given. "weights": those of the graph, with those of the checkpoint.
Kind = Literal["operation", "product", "blocks", "rounding", "weights"]
# Compared at a time: the difference of a head with a vocabulary of 152,000 takes 2 GB.
MAX_ROWS = 8192


@dataclass(frozen=True)
class Comparison:
    """One value of a graph beside the value that it must be.

    Attributes:
        kind: see Kind.
        place: which, for messages.
        error: the largest relative error of a row.
    """

    kind: Kind
    place: str
    error: float


class Steering:
    """Compares what submodules take and give with a graph's values, and goes on with the graph's.

    An error is then that of one operation, whatever came before it: a wrong one shows, however deep the network.

    Args:
        place: of the module, for messages.
        found: gets the comparisons.
        positions: those that the graph has where it computed some positions only; as many as there are, in another
            order, are still some.
    """

    def __init__(self, place: str, found: list[Comparison], positions: Sequence[int]) -> None:
        self._place = place
        self._found = found
        self._positions = list(positions)
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def compare(self, kind: Kind, name: str, own: torch.Tensor, value: NDArray[Any]) -> torch.Tensor:
        """Compare a value [batch, positions, ...]; returns it as the graph has it."""
        import torch

        found = torch.from_numpy(np.ascontiguousarray(value, np.float32))
        is_whole = found.shape[1] == own.shape[1] != len(self._positions)
        expected = own if is_whole else own[:, self._positions]
        self._found.append(Comparison(kind, f"{self._place}, {name}", _largest_error(found, expected)))
        if is_whole:
            return found
        merged = own.clone()
        merged[:, self._positions] = found
        return merged

    def gives(self, kind: Kind, name: str, module: torch.nn.Module, value: NDArray[Any]) -> None:
        """Compare the output of a module."""
        hook = module.register_forward_hook(lambda _module, _inputs, output: self.compare(kind, name, output, value))
        self._hooks.callback(hook.remove)

    def takes(self, kind: Kind, name: str, module: torch.nn.Module, value: NDArray[Any]) -> None:
        """Compare the input of a module; inputs are compared in the order of these calls."""
        hook = module.register_forward_pre_hook(lambda _module, inputs: (self.compare(kind, name, inputs[0], value),))
        self._hooks.callback(hook.remove)

    def product(
        self, name: str, module: torch.nn.Module, rounded: NDArray[np.float32] | None, result: NDArray[Any]
    ) -> None:
        """Compare a linear layer, on what the graph multiplies instead of its input where it rounds that first."""
        if rounded is not None:
            self.takes("rounding", f"input of {name}", module, rounded)
        self.gives("product", name, module, result)


def take_weights(
    module: torch.nn.Module,
    prefix: str,
    rounded: Callable[[str], torch.Tensor | None],
    place: str,
    found: list[Comparison],
) -> None:
    """Give a module the weights of a graph, and compare them with its own, output by output.

    Args:
        module: with the checkpoint's weights.
        prefix: of its weights' names.
        rounded: gives a weight as the graph holds it, by its name; None where that is the checkpoint's.
        place: for messages.
        found: gets the comparisons.
    """
    state = module.state_dict()
    for name, weight in state.items():
        held = rounded(prefix + name)
        if held is None:
            continue
        found.append(Comparison("weights", f"{place}, {name}", _largest_error(held, weight)))
        state[name] = held
    module.load_state_dict(state, assign=True)


def _largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row along the last axis."""
    import torch

    rows, others = (torch.split(value.reshape(-1, value.shape[-1]), MAX_ROWS) for value in (found, expected))
    tiny = np.finfo(np.float32).tiny
    # A row of zeros that is found to be zero has no error.
    errors = [
        ((mine - its).norm(dim=-1) / its.norm(dim=-1).clamp(min=tiny)).max()
        for mine, its in zip(rows, others, strict=True)
    ]
    return float(torch.stack(errors).max())


def worst(found: Iterable[Comparison]) -> dict[Kind, Comparison]:
    """The largest error of each kind that was compared; NaN is larger than any."""
    largest: dict[Kind, Comparison] = {}
    for comparison in found:
        known = largest.get(comparison.kind)
        if known is None or not comparison.error <= known.error:
            largest[comparison.kind] = comparison
    return {kind: largest[kind] for kind in get_args(Kind) if kind in largest}
