"""What the tests of training share: a program that computes nothing, and a folder for it to run in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import data.runs.start
from data.runs.tests.support import Folders, Stub, clocked, noisy, place_in, trained
from data.text.tokenizer import GPT2Tokenizer


class NameOnly(GPT2Tokenizer):
    """GPT-2's, without files: writing them at every checkpoint would take longer than all else."""

    def files(self, context: int | None = None) -> dict[str, str]:
        return {}


@pytest.fixture(autouse=True, scope="package")
def tokenizer_of_any_model() -> Iterator[None]:
    """The models here have so few tokens that no tokenizer fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.runs.start, "of_folder", lambda folder, vocab_size: NameOnly({}))
        yield


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return clocked(monkeypatch)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights `init` and tokens `data`; tests write their runs to folders of their own."""
    return place_in(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = place_in(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, folder / "run", trained(noisy(clocked(monkeypatch)), folder, "run")
