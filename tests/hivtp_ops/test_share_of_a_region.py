"""The share that the global stage keeps of a region, where floating point is just below a whole number.

0.29 of 100 patches are 29, and `0.29 * 100` is 28.999999999999996. The expected numbers are written out here: a form of
the rule that rounds otherwise fails, also where all forms do so together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hivtp_ops import PruningSpec, select, torch_op
from hivtp_ops.kernel import hierarchical_prune_kernel
from tests.hivtp_ops.brute_force import prune_batch
from tests.hivtp_ops.host_kernel import COMPILER, HostKernels
from tests.hivtp_ops.test_onnx_function import run as run_function

if TYPE_CHECKING:
    from collections.abc import Callable

GRID = (10, 10)
# Ratio and patches that the global stage keeps of 100; the local stage keeps one more of the only window.
SHARES = [
    (0.29, 29),
    (0.57, 57),
    (0.58, 58),
    (1 / 3 * 0.87, 29),
    (0.28, 28),
    (0.25, 25),
    # Not a rounded 29: the rule takes the whole part.
    (0.28999, 28),
    (0.2899, 28),
]
SPECS = [PruningSpec(regions=1, window=10, global_ratio=ratio) for ratio, _ in SHARES]
# The best patches are the first ones of this order.
ORDER = np.random.default_rng(0).permutation(100)


def maps() -> np.ndarray:
    """One tile whose patches score by their place in ORDER."""
    scores = np.empty((1, 100), np.float32)
    scores[0, ORDER] = np.linspace(1, 0, 100)
    return scores


every_share = pytest.mark.parametrize("number", range(len(SHARES)), ids=[str(ratio) for ratio, _ in SHARES])


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the kernel on a CPU with")
    return HostKernels([hierarchical_prune_kernel(GRID, spec) for spec in SPECS], tmp_path_factory.mktemp("kernels"))


def by_brute_force(spec: PruningSpec) -> np.ndarray:
    [kept], [count] = prune_batch(maps(), GRID, spec)
    return np.array(kept[:count])


def by_numpy(spec: PruningSpec) -> np.ndarray:
    selection = select(maps(), GRID, spec)
    return selection.indices[0, : selection.counts[0]]


def by_torch(spec: PruningSpec) -> np.ndarray:
    indices, counts = torch_op.prune(torch.from_numpy(maps()), GRID, spec)
    return indices[0, : counts[0]].numpy()


def by_onnx(spec: PruningSpec) -> np.ndarray:
    indices, counts = run_function(maps(), GRID, spec)
    return indices[0, : counts[0]]


@pytest.mark.parametrize("form", [by_brute_force, by_numpy, by_torch, by_onnx])
@every_share
def test_a_form_keeps_the_share_that_the_ratio_says(form: Callable[[PruningSpec], np.ndarray], number: int) -> None:
    _, num_kept = SHARES[number]
    assert form(SPECS[number]).tolist() == sorted(ORDER[: num_kept + 1].tolist())


@every_share
def test_the_kernel_keeps_the_share_that_the_ratio_says(host_kernels: HostKernels, number: int) -> None:
    _, num_kept = SHARES[number]
    indices, counts = host_kernels.run(number, maps(), SPECS[number].capacity(GRID))
    assert counts.tolist() == [num_kept + 1]
    assert indices[0, : num_kept + 1].tolist() == sorted(ORDER[: num_kept + 1].tolist())


def test_every_region_has_its_own_share() -> None:
    """Regions of 100, 100, 110 and 110 patches: 0.29 of 110 is 31.9."""
    spec = PruningSpec(regions=2, window=2, global_ratio=0.29)
    assert spec.quotas((20, 20)).tolist() == [29] * 4
    assert spec.quotas((21, 20)).tolist() == [29, 29, 31, 31]
