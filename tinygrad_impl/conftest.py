"""Before any test imports Triton: where there is no NVIDIA GPU, its kernels run in its interpreter. With --arch they
are those of another architecture. And for all tests, those of parity_tests too: how hard tinygrad tries to make kernels
fast.
"""

import ctypes
import os
from collections.abc import Iterator
from importlib import import_module

import pytest

try:
    found = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
except OSError:  # no driver
    found = False
if not found:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--arch",
        metavar="ARCH",
        help="test the kernels as for such a GPU, an older one than that at hand: sm_80, or sm_80:108 with 108 "
        "multiprocessors",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported, the GPU that kernels/tests/support.py has them be for is known, or refused."""
    if arch := config.getoption("--arch"):
        os.environ["TESTED_ARCH"] = arch
        from data.cli import InputError

        try:
            import_module("tinygrad_impl.kernels.tests.support")
        except InputError as e:
            raise pytest.UsageError(str(e)) from None


@pytest.fixture(scope="session", autouse=True)
def prepared_device() -> None:
    """The device that DEV names, or the CPU, as the programs open it."""
    from tinygrad_impl.device import open_device  # after TRITON_INTERPRET is set

    open_device(os.environ.get("DEV") or "CPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test and its fixtures. tinygrad's tuned kernels take it twice as long to plan, so only the tests that are
    marked `tuned` have them: those of arithmetic, and the proof.
    """
    from tinygrad.helpers import Context  # after TRITON_INTERPRET is set

    simple = int(not found and item.get_closest_marker("tuned") is None)
    with pytest.MonkeyPatch.context() as patch, Context(NOOPT=simple):
        patch.setenv("NOOPT", str(simple))  # for the programs that it starts
        return (yield)
