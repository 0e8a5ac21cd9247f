from __future__ import annotations

import sys

import pytest

from hivtp.engines.gpu import Gpu, find_gpu
from hivtp_ops.errors import MissingExtraError
from tests.engines.tensorrt import fake_gpu


def test_a_gpu_is_described_by_name_capability_and_driver(monkeypatch):
    fake_gpu.install(monkeypatch)
    assert find_gpu() == Gpu("NVIDIA Fake", (9, 0), driver="580.65.6", cuda="13.0")
    assert str(find_gpu()) == "NVIDIA Fake (compute capability 9.0, driver 580.65.6)"


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    fake_gpu.install(monkeypatch, has_driver=False)
    assert find_gpu() is None


def test_without_cuda_core_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingExtraError, match=r"cuda\.core is not installed.*hivtp\[tensorrt\]"):
        find_gpu()


def test_the_real_cuda_core_says_so_where_there_is_no_driver_or_describes_the_gpu():
    # By its own name: PyTorch for CUDA brings another part of the package `cuda`.
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    gpu = find_gpu()
    assert gpu is None or (gpu.name and gpu.compute_capability >= (5, 0) and gpu.driver)
