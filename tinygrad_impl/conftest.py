"""Before any test imports Triton: where there is no NVIDIA GPU, its kernels run in its interpreter."""

import ctypes
import os

import pytest

try:
    found = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
except OSError:  # no driver
    found = False
if not found:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def prepared_device() -> None:
    """The device that DEV names, or the CPU, as the programs open it."""
    from tinygrad_impl.device import open_device  # after TRITON_INTERPRET is set

    open_device(os.environ.get("DEV") or "CPU")
