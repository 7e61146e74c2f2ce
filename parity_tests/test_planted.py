"""The catalogue of bugs in source files. `python -m parity_tests.mutants --where source` plants them all."""

import ast
from pathlib import Path

import pytest

from parity_tests import planted
from parity_tests.planted import ROOT, catalogue, caught, copied_tree, planted_source, run_tests


def test_every_bug_can_be_planted() -> None:
    """The words that it exchanges stand in its file once, and what it leaves is Python (or C) still."""
    rows = catalogue()
    assert len({row[0] for row in rows}) == len(rows) >= 80
    for row in rows:
        source = planted_source(row)
        assert source != (ROOT / row[1]).read_text(encoding="utf-8")
        if row[1].endswith(".py"):
            ast.parse(source)


def test_every_bug_names_a_test_that_is_there() -> None:
    for name, _, _, _, test in catalogue():
        file, _, rest = test.partition("::")
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert rest.partition("[")[0].rpartition("::")[2] in functions, (name, test)


def test_words_that_are_not_there() -> None:
    row = ("a bug", "data/revision.py", "no such words", "others", "")
    with pytest.raises(LookupError, match=r"a bug: data/revision\.py has 0 times 'no such words'"):
        planted_source(row)
    with pytest.raises(LookupError, match="has 1 times"):  # it changes nothing
        planted_source(("a bug", "data/revision.py", "unknown = {", "unknown = {", ""))


def test_a_bug_acts_in_the_tests_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    test = "data/tests/test_revision.py::test_a_commit_and_what_was_changed_since"
    before = (ROOT / "data" / "revision.py").read_text()
    assert caught(("upside down", "data/revision.py", "not changes", "bool(changes)", test)) == test
    assert caught(("harmless", "data/revision.py", "timeout=30", "timeout=29", test)) is None
    with pytest.raises(RuntimeError, match="pytest ended with 4"):  # no such test
        caught(("elsewhere", "data/revision.py", "timeout=30", "timeout=29", f"{test}_and_more"))
    assert (ROOT / "data" / "revision.py").read_text() == before


def test_the_copy_is_whole() -> None:
    with copied_tree() as tree:
        for name in ("data/gpt2.tiktoken", "tinygrad_impl/product.c", "tinygrad_impl/zig-clang", "pyproject.toml"):
            assert (tree / name).read_bytes() == (ROOT / name).read_bytes()
        assert not (tree / ".git").exists()
        (tree / "test_it.py").write_text(f"import data\n\ndef test_it(): assert {str(tree)!r} in data.__file__\n")
        assert run_tests(tree, "test_it.py") == 0
        (tree / "test_it.py").write_text("def test_it(): assert False\n")
        assert run_tests(tree, "test_it.py") == 1
    assert not Path(tree).exists()


def test_every_room_is_planted() -> None:
    """A table that no room names would never be."""
    tables = {path.stem for path in (ROOT / "parity_tests" / "catalogue").glob("*.py")} - {"__init__"}
    assert tables == set(planted.ROOMS)
