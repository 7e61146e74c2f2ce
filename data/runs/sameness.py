"""Whether all ranks train the same: a difference would not show in any loss for a long time. It is refused by name."""

import hashlib
import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

from data.cli import PACKAGES
from data.ranks import Ranks
from data.runs.options import Given, Options, flag
from data.runs.revision import ROOT
from data.runs.together import refuse_differences

OWN = ("device", "quiet")  # options that each rank may have of its own
SOURCES = ("data", "torch_ref", "tinygrad_impl", "parity_tests")


def refuse_other_programs(ranks: Ranks, given: Given) -> None:
    """Raises `InputError` on all ranks where one has other options, versions or source code than rank 0."""
    if ranks.size == 1:
        return
    begun = {f"the state of {given.get('out')}": "begun" if "resume" in given else "not begun"}
    if "resume_if_any" in given:
        refuse_differences(ranks, begun, "put the run's folder on a disk that all hosts share")
    options = {flag(name): value for name, value in given.items() if name not in OWN}
    refuse_differences(ranks, options, "give all ranks the same options")
    refuse_differences(ranks, versions(), "install the same versions on all hosts")
    refuse_differences(ranks, {"the source code": source_digest()}, "copy the same files of this project to all hosts")


def refuse_other_starts(ranks: Ranks, options: Options, sums: dict[str, str]) -> None:
    """Raises `InputError` on all ranks where one is about to train with other options than rank 0, or on other inputs:
    `sums` has a SHA-256 of each.
    """
    recorded = {flag(name): value for name, value in options.recorded().items()}
    refuse_differences(ranks, recorded, "give all ranks the same options")
    refuse_differences(ranks, sums, "copy the same files to all hosts, or put them on a disk that they share")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that compute or read, where they are installed."""
    found = {"the version of python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[f"the version of {package}"] = importlib.metadata.version(package)
    return found


def source_digest(root: Path = ROOT) -> str:
    """The SHA-256 of the project's Python and C files, tests apart."""
    sha256 = hashlib.sha256()
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.[pc]*")):
            if path.suffix in (".py", ".c") and "tests" not in path.relative_to(root).parts:
                sha256.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sha256.hexdigest()
