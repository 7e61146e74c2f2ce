"""The mutation tester: which changes it makes, which tests it runs on them, and what it tells."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.testing import call, refused
from parity_tests import mutation
from parity_tests.mutation import Mutant, judges, product_files, summary, test_of, tried
from parity_tests.planted import Server, copied_tree

test_of.__test__ = False  # type: ignore[attr-defined]  # it is none
SOURCE = '''"""One + one."""
def double(x: int | None, most: int = 7) -> int | str:
    if x is None:
        return "a" + "b"
    for _ in range(2):
        x = x * 2
    return x
'''


def test_what_is_changed() -> None:
    pytest.importorskip("cosmic_ray", reason="needs cosmic-ray, which `make mutants` installs")
    found = list(mutation.places("data/x.py", SOURCE))
    changes: dict[tuple[int, int], list[str]] = {}
    for place in found:
        for mutant in place:
            new = mutation.changed(mutant, SOURCE)
            assert new
            changes.setdefault((mutant.line, mutant.column), []).append(mutation.difference(SOURCE, new)[1])
    assert all(line > 1 for line, _ in changes)  # no docstring
    assert (2, 14) not in changes  # no annotation: x: int | None
    assert sorted(change for (line, _), made in changes.items() if line == 2 for change in made) == [
        "+ def double(x: int | None, most: int = 6) -> int | str:",
        "+ def double(x: int | None, most: int = 8) -> int | str:",
    ]
    times = [change for (line, _), made in changes.items() if line == 6 for change in made]
    assert {"+ x = x + 2", "+ x = x - 2", "+ x = x * 3", "+ x = x * 1"} <= set(times)
    assert any("in []" in change for made in changes.values() for change in made)
    assert {mutant.function for place in found for mutant in place} == {"double"}


def test_a_sample_is_the_same_for_its_seed(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray", reason="needs cosmic-ray, which `make mutants` installs")
    (tmp_path / "data" / "tests").mkdir(parents=True)
    (tmp_path / "data" / "a.py").write_text(SOURCE)
    (tmp_path / "data" / "b.py").write_text("y = 1 + 2 + 3 + 4\n")
    (tmp_path / "data" / "tests" / "c.py").write_text("z = 5\n")
    all_of = mutation.sampled(100, 1, root=tmp_path)
    assert {m.file for m in all_of} == {"data/a.py", "data/b.py"}
    assert mutation.sampled(100, 1, root=tmp_path) == all_of
    assert mutation.sampled(5, 1, root=tmp_path) == all_of[:5]
    assert mutation.sampled(5, 2, root=tmp_path) != all_of[:5]
    assert {m.file for m in mutation.sampled(100, 1, "b.py", tmp_path)} == {"data/b.py"}
    assert len({(m.file, m.line, m.column, m.operator) for m in all_of}) == len(all_of)
    (tmp_path / "data" / "b.py").write_text("y = 1\n")
    other = mutation.sampled(100, 1, root=tmp_path)
    assert [m for m in other if m.file == "data/a.py"] == [m for m in all_of if m.file == "data/a.py"]


def test_the_product_is_what_users_run() -> None:
    files = product_files()
    assert {"data/cli.py", "torch_ref/model.py", "tinygrad_impl/kernels/decode.py", "parity_tests/bounds.py"} <= {
        *files
    }
    assert not [f for f in files if "test" in f.rpartition("/")[2] or "/tests/" in f or f.endswith("conftest.py")]


def test_whose_context_it_is() -> None:
    assert test_of("t.py::a[x|y]|run") == "t.py::a[x|y]"
    assert test_of("t.py::a|setup") == "t.py::"  # a fixture, which other tests of the file may use
    assert test_of("t.py::a (call)") == "t.py::a"  # a process that the test started
    assert test_of("t.py::a (setup)") == "t.py::"
    assert test_of("") == test_of("import") == ""


def mutant(line: int) -> Mutant:
    return Mutant("data/x.py", line, 0, "f", "core/AddNot", 0, "0")


def test_which_tests_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the line, the fastest first; then those of the file; then no more, when they take too long together."""
    monkeypatch.setattr(mutation, "PATIENCE", 100.0)
    seconds = {"t.py::slow": 60.0, "t.py::fast": 1.0, "t.py::other": 0.5, "u.py::one": 30.0, "u.py::two": 50.0}
    lines = {"data/x.py": {3: ["t.py::slow", "t.py::fast"], 4: ["t.py::other"], 5: ["u.py::"]}}
    assert judges(mutant(3), lines, seconds) == ["t.py::fast", "t.py::slow", "t.py::other", "u.py::one"]
    assert judges(mutant(5), lines, seconds) == ["u.py::one", "u.py::two", "t.py::other", "t.py::fast"]
    assert judges(mutant(9), lines, seconds)[0] == "t.py::other"  # run while importing: any test of the file may tell
    assert judges(mutant(3), {}, seconds) == []
    assert judges(mutant(3), lines, seconds | {"t.py::fast": 300.0, "t.py::slow": 301.0})[0] == "t.py::fast"
    lines = {"data/x.py": {3: ["t.py::other", "u.py::one"]}}  # what is quick there may need what takes long there
    assert judges(mutant(3), lines, seconds | {"t.py::fixture": 30.0})[:2] == ["u.py::one", "t.py::other"]


def test_a_mutant_is_tried_in_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where the test fails, survived where it passes, and no test, if none runs the file. The copy is mended."""
    test = "data/tests/test_files.py::test_the_old_file_stays_until_then"  # whose file imports little
    backwards = ("os.replace(temporary, path)", "os.replace(path, temporary)", "killed")
    with copied_tree() as tree:
        server, file = Server(tree, ["pytest"]), tree / "data" / "files.py"
        source = file.read_text()
        try:
            for old, new, outcome in (backwards, ("lock.read(200)", "lock.read(201)", "survived")):
                monkeypatch.setattr(mutation, "changed", lambda _, text, old=old, new=new: text.replace(old, new))
                place = Mutant("data/files.py", 35, 0, "atomic_write", "core/AddNot", 0, "0")
                result = tried(place, server, {"data/files.py": {35: [test]}}, {test: 1.0})
                assert (result["outcome"], result["by"]) == (outcome, test if outcome == "killed" else "")
                assert len(result["diff"]) == 2
                assert tried(place, server, {}, {test: 1.0})["outcome"] == "no test"
                assert file.read_text() == source
            (tree / "test_it.py").write_text("def test_it():\n    while True: pass\n")
            assert server.run(["test_it.py"], 3.0) == {"code": None, "by": "no end"}
            (tree / "test_it.py").write_text("import os\ndef test_it(): os.abort()\n")
            assert server.run(["test_it.py"], 30.0) == {"code": None, "by": "a crash"}
        finally:
            server.process.kill()
            server.process.wait()


def test_the_summary() -> None:
    rows: list[dict[str, Any]] = [{"file": "data/a.py", "outcome": "killed"} for _ in range(6)]
    rows += [{"file": "data/a.py", "outcome": "survived"}, {"file": "torch_ref/b.py", "outcome": "killed"}]
    rows += [{"file": "torch_ref/b.py", "outcome": outcome} for outcome in ("no test", "nothing to change", "killed")]
    table = [line.split() for line in summary(rows).splitlines()]
    assert table[1:] == [
        ["data", "7", "6", "1", "0", "85.7%"],
        ["torch_ref", "3", "2", "0", "1", "66.7%"],
        ["all", "10", "8", "1", "1", "80.0%"],
    ]


def test_what_is_known_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last result of a mutant counts, and a line that was being written is left out."""
    monkeypatch.setattr(mutation, "FOLDER", tmp_path)
    assert mutation.results() == {}
    lines = [json.dumps({"key": "a", "outcome": outcome}) for outcome in ("survived", "killed")]
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, '{"key": "b", "outc']))
    assert mutation.results() == {"a": {"key": "a", "outcome": "killed"}}


def test_bad_options(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray", reason="needs cosmic-ray, which `make mutants` installs")
    refused(call(mutation.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
    refused(call(mutation.main, "--only", "no/such/file", cwd=tmp_path), "no source file has 'no/such/file'")
    refused(call(mutation.main, "--sample", "0", cwd=tmp_path), "--sample")
