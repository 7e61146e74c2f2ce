"""Bugs planted in what only a GPU of Hopper computes."""

from pathlib import Path

import pytest

from data.testing import call, refused
from parity_tests import planted_on_gpu
from parity_tests.planted import ROOT, planted_source
from parity_tests.planted_on_gpu import PLANTED


def test_every_bug_can_be_planted() -> None:
    for row in PLANTED:
        compile(planted_source(row), row[1], "exec")
        assert row[4].partition("::")[2].partition("[")[0] in (ROOT / row[4].partition("::")[0]).read_text()


@pytest.mark.parametrize("whole", ["skipped", "failed", "passed"])
def test_the_command(whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses where the tests show nothing, and says which bugs they do not catch."""
    answers = iter([whole, "failed", "passed"])
    monkeypatch.setattr(planted_on_gpu, "outcome", lambda *tests: next(answers))
    monkeypatch.setattr(planted_on_gpu, "PLANTED", PLANTED[:2])
    result = call(planted_on_gpu.main, cwd=tmp_path)
    if whole == "passed":
        assert result.code == 1
        assert f"NOT CAUGHT: {PLANTED[1][0]}" in result.out
        assert "2 bugs planted, 1 caught" in result.out
    else:
        refused(result, {"skipped": "a GPU of Hopper", "failed": "fail without any bug"}[whole])


@pytest.mark.slow  # starts pytest four times
def test_what_became_of_tests(tmp_path: Path) -> None:
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip()\ndef test_c(): assert False\n"
    (tmp_path / "test_it.py").write_text(tests)
    for letter, result in zip("abc", ("passed", "skipped", "failed"), strict=True):
        assert planted_on_gpu.outcome(str(tmp_path), f"test_it.py::test_{letter}") == result
    with pytest.raises(LookupError):
        planted_on_gpu.outcome(str(tmp_path), "test_it.py::test_d")
