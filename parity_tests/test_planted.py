"""The catalogue of bugs in source files: some are planted here, `python -m parity_tests.planted` plants them all."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.testing import call, refused
from parity_tests import planted
from parity_tests.planted import ROOT, Server, catalogue, caught, copied_tree, planted_source


def test_every_bug_can_be_planted() -> None:
    """The words that it exchanges stand in its file once, and what it leaves is Python (or C) still."""
    rows = catalogue()
    assert len({row[0] for row in rows}) == len(rows) >= 80
    for row in rows:
        source = planted_source(row)
        assert source != (ROOT / row[1]).read_text(encoding="utf-8")
        if row[1].endswith(".py"):
            compile(source, row[1], "exec")


def test_every_bug_names_a_test_that_is_there() -> None:
    for name, _, _, _, test in catalogue():
        file, _, rest = test.partition("::")
        functions = re.findall(r"(?m)^def (test_\w+)\(", (ROOT / file).read_text())
        assert rest.partition("[")[0].rpartition("::")[2] in functions, (name, test)


def test_words_that_are_not_there() -> None:
    row = ("a bug", "data/runs/revision.py", "no such words", "others", "")
    with pytest.raises(LookupError, match=r"a bug: data/runs/revision\.py has 0 times 'no such words'"):
        planted_source(row)
    with pytest.raises(LookupError, match="has 1 times"):  # it changes nothing
        planted_source(("a bug", "data/runs/revision.py", "unknown = {", "unknown = {", ""))


# of a file whose tests import little, since every process imports it anew
FILE = "data/files.py"
HARMLESS, BUG = ("lock.read(200)", "lock.read(201)"), ("os.replace(temporary, path)", "os.replace(path, temporary)")
TEST = "data/tests/test_files.py::test_the_old_file_stays_until_then"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One in a copy of the repository. It imports nothing before it forks, which is quicker for a test or two."""
    with copied_tree() as tree:
        server = Server(tree, ["pytest"])
        yield server
        server.process.kill()
        server.process.wait()


def test_a_bug_acts_in_the_tests_and_nowhere_else(server: Server) -> None:
    before = (ROOT / FILE).read_text()
    assert caught(("backwards", FILE, *BUG, TEST), server)
    assert not caught(("harmless", FILE, *HARMLESS, TEST), server)
    with pytest.raises(LookupError, match="elsewhere: there is no test"):
        caught(("elsewhere", FILE, *HARMLESS, f"{TEST}_and_more"), server)
    assert (ROOT / FILE).read_text() == (server.tree / FILE).read_text() == before


def test_the_copy_is_whole(server: Server) -> None:
    for name in (
        "data/text/gpt2.tiktoken",
        "data/runs/run_folder.py",
        "tinygrad_impl/vectors.h",
        "tinygrad_impl/gemm.c",
        "tinygrad_impl/decode.c",
        "tinygrad_impl/zig-clang",
        "pyproject.toml",
    ):
        assert (server.tree / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (server.tree / ".git").exists()
    words = f"import subprocess, sys\nimport data\n\ndef test_it():\n    assert {str(server.tree)!r} in data.__file__\n"
    words += "    code = 'import data; print(data.__file__)'\n"
    words += "    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout\n"
    (server.tree / "test_it.py").write_text(f"{words}    assert out.strip() == data.__file__\n")
    assert server.run(["test_it.py"], 60.0) == {"code": 0, "by": ""}
    (server.tree / "test_it.py").write_text("def test_it(): assert False\n")
    assert server.run(["test_it.py"], 60.0) == {"code": 1, "by": "test_it.py::test_it"}
    (server.tree / "test_it.py").unlink()


def test_kernels_are_interpreted_in_a_server() -> None:
    """Or their tests would all fail, whatever bug there is."""
    imports = [module for module in planted.IMPORTS if module in ("pytest", "tinygrad_impl.conftest", "triton")]
    with copied_tree() as tree:
        server = Server(tree, imports)
        test = "tinygrad_impl/kernels/tests/test_layer_norm.py::test_mean_far_from_zero"
        assert server.run([test], 120.0) == {"code": 0, "by": ""}
        server.process.kill()
        server.process.wait()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which are not caught, and by which test they should have been."""
    rows = [("one bug", FILE, *HARMLESS, TEST), ("another", FILE, *BUG, TEST)]
    rows += [("a third", "data/cli.py", "import errno", "import errno as e", TEST)]
    monkeypatch.setattr(planted, "catalogue", lambda: rows)
    monkeypatch.setattr(planted.Server.__init__, "__defaults__", (["pytest"],))
    result = call(planted.main, "--only", "files", "--jobs", 1, cwd=tmp_path)
    assert result.code == 1
    assert f"NOT CAUGHT: one bug ({FILE}), by {TEST}\n2 bugs planted, 1 caught (" in result.out
    assert call(planted.main, "--only", "another", "--jobs", 1, cwd=tmp_path).code == 0
    refused(call(planted.main, "--only", "no such bug", cwd=tmp_path), "no bug has 'no such bug'")


def test_every_table_is_planted() -> None:
    """A table that `TABLES` leaves out would never be. Those of `planted_on_gpu` are its own."""
    on_gpu = {"pingpong", "hopper_attention"}
    tables = {path.stem for path in (ROOT / "parity_tests" / "catalogue").glob("*.py")} - {"__init__"} - on_gpu
    assert tables == set(planted.TABLES)
