"""Checks the inputs of engines that take what they are given as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from hivtp_ops.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from hivtp.engines.base import Arrays

# Dtype and shape of an input, the latter without the number of tiles.
InputType: TypeAlias = "tuple[np.dtype[Any], tuple[int, ...]]"


def check_inputs(inputs: Arrays, expected: Mapping[str, InputType], taker: str) -> set[int]:
    """The numbers of tiles of inputs that are of the right names, dtypes and shapes.

    Args:
        inputs: arrays by name.
        expected: all that there must be.
        taker: what takes them, for people.

    Raises:
        EngineError: they are not.
    """
    if set(inputs) != set(expected):
        raise EngineError(f"the {taker} takes {sorted(expected)}, not {sorted(inputs)}")
    for name, (dtype, tail) in expected.items():
        array = inputs[name]
        if array.dtype != dtype or array.shape[1:] != tail:
            raise EngineError(
                f"{name} is {array.dtype} {list(array.shape)}; the {taker} takes {dtype} of shape {['tiles', *tail]}"
            )
    return {len(array) for array in inputs.values()}
