"""Bugs planted in source files of a copy of the repository, so that they act in every process that a test starts."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parity_tests.catalogue import Row

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "training", "programs", "kernels", "proof")
LEFT_OUT = (".git", ".venv", "runs", "build", "__pycache__", ".*_cache", "*.egg-info")


def catalogue() -> list[Row]:
    """Every room's rows."""
    return [row for room in ROOMS for row in importlib.import_module(f"parity_tests.catalogue.{room}").PLANTED]


def planted_source(row: Row) -> str:
    """The row's file with the bug in it. Raises `LookupError` unless the words stand there once: it has changed."""
    name, file, old, new, _ = row
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1 or old == new:
        raise LookupError(f"{name}: {file} has {source.count(old)} times {old!r}")
    return source.replace(old, new)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the repository in a folder of its own, with what is beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary, "repository")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if (ROOT.parent / "shared").exists():  # real stories, which some tests read
            tree.with_name("shared").symlink_to(ROOT.parent / "shared")
        yield tree


def run_tests(tree: Path, *tests: str, timeout: float = 600) -> int:
    """pytest's exit code there: 0 if the tests pass, 1 if one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=timeout).returncode


def caught(row: Row) -> str | None:
    """The test that fails with the bug planted. None if it passes; raises `RuntimeError` if it cannot be run."""
    *_, test = row
    with copied_tree() as tree:
        (tree / row[1]).write_text(planted_source(row), encoding="utf-8")
        code = run_tests(tree, test)
    if code not in (0, 1):
        raise RuntimeError(f"{row[0]}: pytest ended with {code} on {test}")
    return test if code else None
