"""What the tests of training share: a program that computes nothing, and a folder for it to run in."""

from pathlib import Path

import pytest

from data.runs.tests.support import Stub, clocked, place_in


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return clocked(monkeypatch)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights `init` and tokens `data`; tests write their runs to folders of their own."""
    return place_in(tmp_path_factory.mktemp("place"))
