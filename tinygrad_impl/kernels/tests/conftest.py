"""The device of the tests in which kernels are nodes of tinygrad's graphs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tinygrad_impl.device import open_device
from tinygrad_impl.kernels import launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test-gpu` runs, besides what needs a GPU."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("kernels")


@pytest.fixture(scope="module")
def device() -> Iterator[None]:
    """A GPU, or else the CPU, with kernels in Triton's interpreter."""
    from tinygrad_impl.kernels.tests.support import DEVICE, interpreted_program  # here: it has to know of --arch

    open_device("CUDA" if DEVICE == "cuda" else "CPU")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(launch, "program", interpreted_program)
        yield
