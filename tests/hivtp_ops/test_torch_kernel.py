from __future__ import annotations

import contextlib
import enum
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from hivtp_ops import PRESETS, PruningSpec, op, select, torch_kernel, torch_op
from hivtp_ops.errors import KernelError
from hivtp_ops.kernel import hierarchical_prune_kernel
from tests.hivtp_ops.brute_force import CASES, PAPER_GRID, hard_maps
from tests.hivtp_ops.host_kernel import COMPILER, HostKernels

GRID, SPEC = (5, 7), PruningSpec(regions=2, window=3, global_ratio=0.3, keep=11)


def assert_is_selection(outputs, maps, grid, spec):
    indices, counts = outputs
    expected = select(maps, grid, spec)
    assert indices.dtype == counts.dtype == torch.int64
    assert np.array_equal(indices.cpu().numpy(), expected.indices)
    assert np.array_equal(counts.cpu().numpy(), expected.counts)


def select_as_on_cuda(scores, grid, spec):
    keep = op.NO_KEEP if spec.keep is None else spec.keep
    return torch_op._select_on_cuda(scores, *grid, spec.regions, spec.global_ratio, spec.window, keep)


@pytest.fixture(autouse=True)
def _no_kernels_yet():
    torch_op._kernel.cache_clear()
    yield
    torch_op._kernel.cache_clear()


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class HostDriver:
    """Stands in for cuda.bindings.driver, and launches the kernel's host build."""

    CUfunction = int

    def __init__(self, kernels):
        self.kernels = kernels
        self.result = Result.CUDA_SUCCESS
        self.launches = []
        self.num_loads = 0
        self.context = 0

    def cuLibraryLoadData(self, code, *_options):  # noqa: N802  NVIDIA's names
        assert code == b"cubin"
        self.num_loads += 1
        return self.result, "library"

    def cuLibraryGetKernel(self, library, name):  # noqa: N802
        assert (library, name) == ("library", b"hierarchical_prune")
        return Result.CUDA_SUCCESS, 0

    def cuCtxGetCurrent(self):  # noqa: N802
        return Result.CUDA_SUCCESS, self.context

    def cuDeviceGet(self, _ordinal):  # noqa: N802
        return Result.CUDA_SUCCESS, 0

    def cuDevicePrimaryCtxRetain(self, _device):  # noqa: N802
        return Result.CUDA_SUCCESS, 5

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.context = context
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function, *arguments):  # noqa: N802
        *shape, stream, (pointers, types_), extra = arguments
        assert len(pointers) == len(types_)
        assert extra == 0
        assert self.context == 5, "a launch needs a context"
        self.launches.append((*shape, stream))
        self.kernels.launch(function, pointers, shape[0])
        return (self.result,)


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the kernel on a CPU with")
    return HostKernels([hierarchical_prune_kernel(GRID, SPEC)], tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def driver(monkeypatch, host_kernels):
    driver = HostDriver(host_kernels)
    bindings = types.SimpleNamespace(driver=driver)
    monkeypatch.setitem(sys.modules, "cuda", types.SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch_kernel, "compile_kernel", lambda _source, target: {"sm_90": b"cubin"}[target])
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    return driver


def test_launch_gives_the_kernel_what_it_takes(driver):
    maps = hard_maps(GRID, SPEC)
    assert_is_selection(select_as_on_cuda(torch.from_numpy(maps), GRID, SPEC), maps, GRID, SPEC)
    assert driver.launches == [(len(maps), 1, 1, 64, 1, 1, 0, 77)]


def test_kernel_is_loaded_once(driver):
    for _ in range(3):
        select_as_on_cuda(torch.rand(2, 35), GRID, SPEC)
    assert driver.num_loads == 1
    assert len(driver.launches) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("driver")
def test_other_dtypes_and_strides_are_converted(dtype):
    scores = torch.rand(35, 3, generator=torch.manual_seed(0)).to(dtype).T
    assert_is_selection(select_as_on_cuda(scores, GRID, SPEC), scores.float().numpy(), GRID, SPEC)


def test_no_tiles_launch_nothing(driver):
    indices, counts = select_as_on_cuda(torch.zeros(0, 35), GRID, SPEC)
    assert (indices.shape, counts.shape) == ((0, 11), (0,))
    assert driver.launches == []


def test_launch_that_the_driver_refuses_is_an_error(driver):
    select_as_on_cuda(torch.rand(2, 35), GRID, SPEC)
    driver.result = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_VALUE"):
        select_as_on_cuda(torch.rand(2, 35), GRID, SPEC)


def test_kernel_that_the_driver_cannot_load_is_done_without(driver):
    driver.result = Result.CUDA_ERROR_INVALID_VALUE
    maps = hard_maps(GRID, SPEC)
    with pytest.warns(UserWarning, match="CUDA_ERROR_INVALID_VALUE"):
        outputs = select_as_on_cuda(torch.from_numpy(maps), GRID, SPEC)
    assert_is_selection(outputs, maps, GRID, SPEC)
    assert driver.launches == []


def test_kernel_that_cannot_be_compiled_is_done_without_after_one_warning(monkeypatch):
    def refuse(_source, _target):
        raise KernelError("NVRTC is not found")

    monkeypatch.setattr(torch_kernel, "compile_kernel", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    maps = hard_maps(GRID, SPEC)
    with pytest.warns(UserWarning, match=r"without its kernel.*NVRTC is not found"):
        assert_is_selection(select_as_on_cuda(torch.from_numpy(maps), GRID, SPEC), maps, GRID, SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_selection(select_as_on_cuda(torch.from_numpy(maps), GRID, SPEC), maps, GRID, SPEC)


def test_gpu_that_is_too_old_for_the_kernel_prunes_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    maps = hard_maps(GRID, SPEC)
    with pytest.warns(UserWarning, match=r"capability 7\.5.*needs 8\.0"):
        assert_is_selection(select_as_on_cuda(torch.from_numpy(maps), GRID, SPEC), maps, GRID, SPEC)


def test_grid_that_is_too_large_for_the_kernel_is_pruned_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    grid, spec = (65, 64), PruningSpec(keep=9)
    maps = np.random.default_rng(0).random((2, math.prod(grid)), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_selection(select_as_on_cuda(torch.from_numpy(maps), grid, spec), maps, grid, spec)


def test_op_has_a_form_of_its_own_for_cuda():
    torch_op.register()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(op.TORCH_NAME, "CUDA")
    assert not has_kernel(op.TORCH_NAME, "XPU"), "else this shows nothing"


gpu = pytest.mark.gpu
case = pytest.mark.parametrize(("grid", "spec"), [*CASES, ((64, 64), PruningSpec(keep=700))], ids=str)


@gpu
@case
def test_gpu_runs_the_kernel_and_gives_what_select_gives(grid, spec):
    maps = hard_maps(grid, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = torch_op.prune(torch.from_numpy(maps).cuda(), grid, spec)
    assert_is_selection(outputs, maps, grid, spec)
    assert torch_op._kernel(grid, spec_of_op(spec), torch.cuda.get_device_capability()) is not None


def spec_of_op(spec):
    return PruningSpec(regions=spec.regions, global_ratio=spec.global_ratio, window=spec.window, keep=spec.keep)


@gpu
@case
def test_gpu_gives_what_select_gives_on_many_maps(grid, spec):
    rng = np.random.default_rng(5)
    shape = (300, math.prod(grid))
    for maps in (rng.random(shape), rng.integers(0, 9, shape), np.where(rng.random(shape) < 0.5, -np.inf, 1.0)):
        scores = maps.astype(np.float32)
        assert_is_selection(torch_op.prune(torch.from_numpy(scores).cuda(), grid, spec), scores, grid, spec)


@gpu
@pytest.mark.parametrize("name", PRESETS)
def test_cuda_graph_replays_the_kernel_on_new_scores(name):
    spec = PRESETS[name]
    maps = hard_maps(PAPER_GRID, spec)
    scores = torch.zeros(len(maps), 576, device="cuda")
    torch_op.prune(scores, PAPER_GRID, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = torch_op.prune(scores, PAPER_GRID, spec)
    for batch in (maps, maps[::-1].copy()):
        scores.copy_(torch.from_numpy(batch))
        graph.replay()
        assert_is_selection(outputs, batch, PAPER_GRID, spec)


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu_is_select(mode):
    spec = PRESETS["192"]
    torch_op.register()
    compiled = torch.compile(lambda scores: torch_op.prune(scores * 1.0, PAPER_GRID, spec), fullgraph=True, mode=mode)
    maps = hard_maps(PAPER_GRID, spec)
    for _ in range(4):
        outputs = [output.clone() for output in compiled(torch.from_numpy(maps).cuda())]
        assert_is_selection(outputs, maps, PAPER_GRID, spec)


@gpu
def test_kernel_runs_on_the_current_stream():
    spec = PRESETS["192"]
    maps = hard_maps(PAPER_GRID, spec)
    scores = torch.zeros(len(maps), 576, device="cuda")
    torch_op.prune(scores, PAPER_GRID, spec)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        scores.copy_(torch.from_numpy(maps).pin_memory(), non_blocking=True)
        outputs = torch_op.prune(scores, PAPER_GRID, spec)
    stream.synchronize()
    assert_is_selection(outputs, maps, PAPER_GRID, spec)


@gpu
def test_kernel_runs_in_a_thread_that_has_done_nothing_on_the_gpu_yet():
    from concurrent.futures import ThreadPoolExecutor

    spec = PRESETS["64"]
    maps = hard_maps(PAPER_GRID, spec)
    scores = torch.from_numpy(maps).cuda()
    torch_op.prune(scores, PAPER_GRID, spec)
    with ThreadPoolExecutor(1) as threads:
        outputs = threads.submit(torch_op.prune, scores, PAPER_GRID, spec).result()
    assert_is_selection(outputs, maps, PAPER_GRID, spec)
