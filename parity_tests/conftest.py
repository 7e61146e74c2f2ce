"""What the tests share: tinygrad's device, and checkpoint folders written once a session by Hugging Face's own code."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinygrad_impl.conftest import pytest_runtest_protocol as pytest_runtest_protocol
from tinygrad_impl.conftest import tokenizer_read_once as tokenizer_read_once
from tinygrad_impl.device import open_device
from torch_ref.testing import save_random_gpt2, save_small_gpt2


@pytest.fixture(scope="session", autouse=True)
def cpu() -> None:
    """The tests are of the CPU device, whatever else the machine has: the references compute there."""
    open_device("CPU")
    torch.set_num_threads(1)  # a process has a core to itself


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers, 4 heads, 64 wide, 32 positions and the full vocabulary."""
    folder = tmp_path_factory.mktemp("small")
    save_small_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the smallest GPT-2's size, 124 million parameters, with random weights."""
    folder = tmp_path_factory.mktemp("full")
    save_random_gpt2(folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte, of which pytest would keep three
