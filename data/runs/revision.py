"""Which state of the source code computed something: the git commit, and whether the files differed from it."""

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def revision(root: Path = ROOT) -> dict[str, Any]:
    """{"commit": 40 hex digits, "clean": whether every file is as committed}, of the repository at `root`.

    Files that git does not track count as a change, ignored ones do not. Both are None where `root` is no git
    repository's top folder, has no commit yet, or git is not installed.
    """
    unknown = {"commit": None, "clean": None}
    if not (root / ".git").exists():  # an installed copy inside some other repository is none of its commits
        return unknown
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": commit, "clean": not changes}
