"""The git commit that results are recorded with."""

import subprocess
from pathlib import Path

import pytest

from data.runs.revision import revision

UNKNOWN = {"commit": None, "clean": None}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_and_what_was_changed_since(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert revision(tmp_path) == UNKNOWN  # no commit yet
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "model.py").write_text("1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    first = git(tmp_path, "rev-parse", "HEAD")
    assert revision(tmp_path) == {"commit": first, "clean": True}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_text("")
    assert revision(tmp_path)["clean"] is True  # ignored
    (tmp_path / "model.py").write_text("2\n")
    assert revision(tmp_path) == {"commit": first, "clean": False}
    git(tmp_path, "commit", "-qam", "second")
    second = git(tmp_path, "rev-parse", "HEAD")
    assert second != first
    assert revision(tmp_path) == {"commit": second, "clean": True}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stories.txt").write_text("")
    assert revision(tmp_path) == {"commit": second, "clean": True}  # no source
    for name in ("new.py", "mine/é.c"):
        (tmp_path / name).write_text("")
        assert revision(tmp_path) == {"commit": second, "clean": False}
        (tmp_path / name).unlink()


def test_where_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert revision(tmp_path) == UNKNOWN
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "empty", "--allow-empty")
    (tmp_path / "inside").mkdir()
    assert revision(tmp_path / "inside") == UNKNOWN
    monkeypatch.setenv("PATH", "")  # no git
    assert revision(tmp_path) == UNKNOWN


def test_this_repository() -> None:
    """By default it is the one that this file is in."""
    root = Path(__file__).parents[3]
    assert revision() == revision(root)
