"""Which state of the source code computed something: the git commit, and whether the files differed from it."""

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = (".py", ".c", ".h")


def revision(root: Path = ROOT) -> dict[str, Any]:
    """{"commit": 40 hex digits, "clean": whether every file is as committed}, of the repository at `root`.

    Of files that git does not track `SOURCES` count as a change, unless they are ignored: a text of the user's computes
    nothing. Both are None where `root` is no git repository's top folder, has no commit yet, or git is not installed.
    """
    unknown = {"commit": None, "clean": None}
    if not (root / ".git").exists():  # an installed copy inside some other repository is none of its commits
        return unknown
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, errors="replace", check=True, timeout=30
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-z", "--untracked-files=all"])
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    changed = [line for line in changes.split("\0") if line and (line[:3] != "?? " or line.endswith(SOURCES))]
    return {"commit": commit, "clean": not changed}
