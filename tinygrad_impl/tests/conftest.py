"""Folders that the port's tests share; no test writes into them."""

from pathlib import Path

import numpy as np
import pytest

from data.testing import save_model, write_tokens
from tinygrad_impl.device import open_device


@pytest.fixture(scope="session", autouse=True)
def cpu() -> None:
    """The tests are of the CPU device, whatever else the machine has."""
    open_device("CPU")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `SMALL`."""
    return save_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 400 and 200 random tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50257, 600)
    return write_tokens(tmp_path_factory.mktemp("prepared") / "data", tokens[:400], tokens[400:])
