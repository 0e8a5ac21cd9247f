from __future__ import annotations

import faulthandler
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivtp_ops import PRESETS, PruningSpec, SpecError, select
from hivtp_ops.kernel import MAX_PATCHES, hierarchical_prune_kernel
from tests.hivtp_ops.brute_force import (
    CASES,
    PAPER_GRID,
    grids_and_specs,
    hard_maps,
    higher_index_wins,
    prune_batch,
    prune_tile,
    score_maps,
)
from tests.hivtp_ops.host_kernel import COMPILER, HostKernels

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to run the kernel on a CPU with")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
both_orders = pytest.mark.parametrize("is_descending", [False, True], ids=["ascending", "descending"])

LARGEST_GRID = (64, 64)
LARGEST = [
    (LARGEST_GRID, PruningSpec.preset("192", LARGEST_GRID)),
    (LARGEST_GRID, PruningSpec(regions=1, window=64)),
    ((63, 65), PruningSpec(regions=63, window=1, global_ratio=0.0)),
]
# Of Ampere, Ada, Hopper and Blackwell.
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
MAX_SHARED_BYTES = 48 * 1024


def random_pairs(number):
    """Draw grids and specs; always the same ones, since each is compiled."""
    pairs = []

    @settings(max_examples=number, database=None, derandomize=True, deadline=None)
    @given(grids_and_specs())
    def collect(pair):
        pairs.append(pair)

    collect()
    return pairs


PAIRS = list(dict.fromkeys([*CASES, *LARGEST, *random_pairs(30)]))
SMALL_PAIRS = [pair for pair in PAIRS if math.prod(pair[0]) < 100]


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    return HostKernels([hierarchical_prune_kernel(*pair) for pair in PAIRS], tmp_path_factory.mktemp("kernels"))


def run(kernels, pair, maps, is_descending=False):
    grid, spec = pair
    return kernels.run(PAIRS.index(pair), maps, spec.capacity(grid), is_descending)


def is_select(outputs, maps, pair):
    expected = select(maps, *pair)
    return np.array_equal(outputs[0], expected.indices) and np.array_equal(outputs[1], expected.counts)


@needs_compiler
@both_orders
@pytest.mark.parametrize("pair", CASES, ids=str)
def test_kernel_is_the_brute_force_on_hard_maps(host_kernels, pair, is_descending):
    maps = hard_maps(*pair)
    indices, counts = run(host_kernels, pair, maps, is_descending)
    assert (indices.tolist(), counts.tolist()) == prune_batch(maps, *pair)


@needs_compiler
@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(SMALL_PAIRS), st.booleans())
def test_kernel_is_select_on_any_map(host_kernels, data, pair, is_descending):
    maps = data.draw(score_maps(math.prod(pair[0])))
    assert is_select(run(host_kernels, pair, maps, is_descending), maps, pair)


@needs_compiler
@pytest.mark.parametrize("name", PRESETS)
def test_kernel_is_select_on_random_maps_of_the_real_size(host_kernels, name):
    rng = np.random.default_rng(11)
    maps = np.concatenate([rng.random((4, 576)), rng.integers(0, 9, (4, 576))]).astype(np.float32)
    pair = (PAPER_GRID, PRESETS[name])
    assert is_select(run(host_kernels, pair, maps), maps, pair)


@needs_compiler
@pytest.mark.parametrize("pair", LARGEST, ids=str)
def test_the_largest_grids_are_pruned_too(host_kernels, pair):
    assert math.prod(pair[0]) >= MAX_PATCHES - 1
    maps = hard_maps(*pair)[[0, 7, 12, 16]]
    assert is_select(run(host_kernels, pair, maps), maps, pair)


@needs_compiler
def test_every_tile_of_a_batch_gives_what_it_gives_alone(host_kernels):
    for pair in CASES[5:9]:
        maps = hard_maps(*pair)
        indices, counts = run(host_kernels, pair, maps)
        for tile in range(len(maps)):
            alone_indices, alone_counts = run(host_kernels, pair, maps[tile : tile + 1])
            assert np.array_equal(alone_indices[0], indices[tile])
            assert alone_counts[0] == counts[tile]


@needs_compiler
def test_nan_in_one_tile_leaves_the_others_alone(host_kernels):
    pair = (PAPER_GRID, PRESETS["192"])
    maps = hard_maps(*pair)[10:]
    broken = maps.copy()
    broken[3, 100:200] = np.nan
    broken[3, 200:300] = -np.float32("nan")
    indices, counts = run(host_kernels, pair, broken)
    others = [tile for tile in range(len(maps)) if tile != 3]
    assert np.array_equal(indices[others], select(maps, *pair).indices[others])
    assert ((indices[3] >= -1) & (indices[3] < 576)).all()
    assert 0 <= counts[3] <= 192


@needs_compiler
def test_wrong_tie_rule_is_seen(host_kernels):
    scores = np.zeros((1, 576), dtype=np.float32)
    for spec in PRESETS.values():
        indices, counts = run(host_kernels, (PAPER_GRID, spec), scores)
        wrong, _ = prune_tile(scores[0].tolist(), PAPER_GRID, spec, sort_key=higher_index_wins)
        assert indices[0, : counts[0]].tolist() != wrong


MISTAKES = [
    ("if (bits == 0x80000000u) bits = 0;", ""),
    ("bits & 0x80000000u ? bits :", "false ? bits :"),
    ("cost < COST_OF_MINUS_INFINITY", "cost <= COST_OF_MINUS_INFINITY"),
    ("if (found <= num)", "if (found < num)"),
    ("(place + 1) * REGIONS - 1", "place * REGIONS"),
    ("QUOTAS[number]", "QUOTAS[0]"),
    ("QUOTAS[number]", "QUOTAS[number] + 1"),
    ("number += NUM_THREADS / WARP", "number += NUM_THREADS"),
    ("first + i * WARP < end ?", "true ?"),
    ("first = region.first_slot() + lane", "first = region.first_slot()"),
    ("slot = first + HELD_PER_LANE * WARP", "slot = first + (HELD_PER_LANE + 1) * WARP"),
    ("keys[slot] += GLOBAL - REST", "keys[slot] += LOCAL - REST"),
    ("key >= REST && key < best", "key < best"),
    ("key >= REST && key < best", "key >= REST && key >> PATCH_BITS <= best >> PATCH_BITS"),
    ("min(top + WINDOW, ROWS)", "min(top + WINDOW, ROWS - 1)"),
    ("min(left + WINDOW, COLS)", "left + WINDOW"),
    ("Key limit = REST;", "Key limit = LOCAL;"),
    ("limit_after(CAPACITY", "limit_after(CAPACITY - 1"),
    ("if (lane == 0 && word < NUM_WORDS) kept_bits[word]", "if (lane == 0) kept_bits[0]"),
    ("word <= NUM_WORDS", "word < NUM_WORDS"),
    ("(1u << lane) - 1", "(2u << lane) - 1"),
    ("i = count + thread", "i = count + thread + 1"),
    ("kept_indices + tile * CAPACITY", "kept_indices"),
]
NUM_BARRIERS = 5
# Exact and not, more regions than warps, a region of more patches than a warp holds, sides that are no multiples.
MISTAKEN_PAIRS = [
    ((5, 7), PruningSpec(regions=2, window=3, global_ratio=0.3, keep=11)),
    ((5, 7), PruningSpec(regions=3, window=2, global_ratio=0.5)),
    ((11, 13), PruningSpec(regions=3, window=4, global_ratio=0.2)),
    ((17, 19), PruningSpec(regions=1, window=5, global_ratio=0.4, keep=150)),
]


def drop_barrier(source, number):
    """Take the barrier out of the source; it is on a line of its own."""
    barriers = list(re.finditer(r"^ +__syncthreads\(\);\n", source, re.MULTILINE))
    assert len(barriers) == NUM_BARRIERS
    return source[: barriers[number].start()] + source[barriers[number].end() :]


def replaced(source, right, wrong):
    assert source.count(right) == 1
    return source.replace(right, wrong)


@pytest.fixture(scope="module")
def mistaken_kernels(tmp_path_factory):
    """Every mistake in the kernel of every pair; mistakes in the order of their tests."""
    kernels = [hierarchical_prune_kernel(*pair) for pair in MISTAKEN_PAIRS]
    sources = [
        *([replaced(kernel.source, *mistake) for kernel in kernels] for mistake in MISTAKES),
        *([drop_barrier(kernel.source, number) for kernel in kernels] for number in range(NUM_BARRIERS)),
    ]
    mistaken = [replace(kernel, source=source) for row in sources for kernel, source in zip(kernels, row, strict=True)]
    return HostKernels([*kernels, *mistaken], tmp_path_factory.mktemp("mistaken"))


def is_select_elsewhere(kernels, number):
    """Whether `is_select_on_hard_maps` holds, in a process of its own: a mistake may write anywhere, and end it."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        is_right = False
        try:
            is_right = is_select_on_hard_maps(kernels, number)
        finally:
            os._exit(int(not is_right))
    _, status = os.waitpid(child, 0)
    return status == 0


def is_select_on_hard_maps(kernels, number):
    """Whether the kernels, of all pairs, that begin at `number` give what select gives, in both orders."""
    for offset, (grid, spec) in enumerate(MISTAKEN_PAIRS):
        maps = hard_maps(grid, spec)
        for is_descending in (False, True):
            try:
                outputs = kernels.run(number + offset, maps, spec.capacity(grid), is_descending)
            except AssertionError:
                return False
            if not is_select(outputs, maps, (grid, spec)):
                return False
    return True


@needs_compiler
def test_kernel_without_a_mistake_passes_where_mistakes_are_sought(mistaken_kernels):
    assert is_select_elsewhere(mistaken_kernels, 0)


@needs_compiler
@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[wrong or "nothing" for _, wrong in MISTAKES])
def test_mistake_in_the_kernel_is_seen(mistaken_kernels, number):
    assert not is_select_elsewhere(mistaken_kernels, (1 + number) * len(MISTAKEN_PAIRS))


@needs_compiler
@pytest.mark.parametrize("number", range(NUM_BARRIERS))
def test_missing_barrier_is_seen(mistaken_kernels, number):
    assert not is_select_elsewhere(mistaken_kernels, (1 + len(MISTAKES) + number) * len(MISTAKEN_PAIRS))


@needs_nvcc
@pytest.mark.parametrize(
    ("pair", "architectures"), [((PAPER_GRID, PRESETS["192"]), ["90"]), (LARGEST[0], ARCHITECTURES)], ids=str
)
def test_nvcc_compiles_the_kernel_and_finds_room_for_a_block(pair, architectures, tmp_path):
    kernel = hierarchical_prune_kernel(*pair)
    source = tmp_path / "kernel.cu"
    source.write_text(kernel.source, encoding="utf-8")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    command = ["nvcc", "--fatbin", "--Werror", "all-warnings", "-Xptxas", "-v", *targets, "-o", tmp_path / "k", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling entry function 'hierarchical_prune'") == len(architectures)
    shared_bytes = [int(number) for number in re.findall(r"(\d+) bytes smem", done.stderr)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(shared_bytes) == len(registers) == len(architectures)
    assert max(shared_bytes) <= MAX_SHARED_BYTES
    assert max(registers) * kernel.num_threads <= 65536
    assert "0 bytes spill stores" in done.stderr
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", done.stderr)


def test_more_patches_than_a_key_has_room_for_are_an_error():
    with pytest.raises(SpecError, match=r"4160 patches.*at most 4096"):
        hierarchical_prune_kernel((64, 65), PruningSpec())


def test_spec_that_does_not_fit_is_an_error():
    with pytest.raises(SpecError, match="window is 8"):
        hierarchical_prune_kernel((5, 7), PruningSpec(window=8))


@pytest.mark.parametrize(
    ("grid", "num_threads"), [((1, 1), 32), ((5, 7), 64), ((24, 24), 576), ((27, 27), 736), ((64, 64), 1024)]
)
def test_a_block_has_whole_warps_and_a_thread_per_patch_where_it_can(grid, num_threads):
    spec = PruningSpec(regions=1, window=1)
    assert hierarchical_prune_kernel(grid, spec).num_threads == num_threads
