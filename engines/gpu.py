"""The GPU of this machine: what a plan is bound to."""

from __future__ import annotations

from dataclasses import dataclass

from hivtp_ops.errors import MissingExtraError


@dataclass(frozen=True)
class Gpu:
    """A GPU and its driver.

    Attributes:
        name: as the driver gives it, e.g. "NVIDIA H200".
        compute_capability: major and minor.
        driver: version of the kernel driver, e.g. "580.65.06".
        cuda: newest CUDA version that the driver runs, e.g. "13.0".
    """

    name: str
    compute_capability: tuple[int, int]
    driver: str
    cuda: str

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor}, driver {self.driver})"


def find_gpu(extra: str = "tensorrt") -> Gpu | None:
    """Describe the first GPU that CUDA shows this process; None where there is no GPU or no driver.

    Args:
        extra: the extra of hivtp that brings what is needed.

    Raises:
        MissingExtraError: cuda-core is not installed.
    """
    try:
        from cuda.core import Device, system
    except ImportError as error:
        raise MissingExtraError("cuda.core", extra) from error
    try:
        device = Device(0)
        major, minor = device.compute_capability
        driver = _dotted(system.get_kernel_mode_driver_version())
        return Gpu(device.name, (int(major), int(minor)), driver, _dotted(system.get_user_mode_driver_version()))
    except Exception:  # noqa: BLE001  no driver, no device and a broken driver each raise a kind of their own
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
