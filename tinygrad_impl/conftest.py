"""Before any test imports Triton: where there is no NVIDIA GPU, its kernels run in its interpreter. With --arch they
are those of another architecture. And for all tests, those of parity_tests too: how hard tinygrad tries to make kernels
fast, and what would take a fifth of their time besides: garbage collection, and GPT-2's tokenizer read from its files.
"""

import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
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
    gc.set_threshold(100_000, 20, 20)  # objects, for Python's 700: modules and tinygrad's graphs are of many
    if arch := config.getoption("--arch"):
        os.environ["TESTED_ARCH"] = arch
        from data.cli import InputError

        try:
            import_module("tinygrad_impl.kernels.tests.support")
        except InputError as e:
            raise pytest.UsageError(str(e)) from None


def pytest_collection_finish() -> None:
    """What is imported stays: no garbage is looked for there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def tokenizer_read_once() -> Iterator[None]:
    """GPT-2's, which nearly every model has here, and whose files take a quarter of a second to recognize."""
    import data.text.tokenizer as module

    from_files, seen = module.from_files, dict[frozenset[tuple[str, str]], module.Tokenizer]()

    def remembered(name: str, files: Mapping[str, str], eos_token_id: object) -> module.Tokenizer:
        key = frozenset(files.items())
        found = seen.get(key) or from_files(name, files, eos_token_id)
        if isinstance(found, module.GPT2Tokenizer):
            seen[key] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "from_files", remembered)
        yield


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
