"""SHA256SUMS, which `sha256sum --check` reads: whether a run's checkpoint still is what was written."""

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from data.checkpoints.tensors import read_json, read_safetensors
from data.cli import InputError
from data.files import atomic_write

SUMS = "SHA256SUMS"
CARD, CURVE = "README.md", "loss.png"  # for people: a card that somebody edits must not make a checkpoint a damaged one
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)\n")


class Fault(NamedTuple):
    """What is wrong with a checkpoint, in words; and whether somebody may have changed it on purpose."""

    words: str
    may_be_meant: bool = False


def digests(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The SHA-256 of every file in `folder` but SHA256SUMS and the model card with its picture, by name; those that are
    `known` are not read.
    """
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (SUMS, CARD, CURVE))
    return {path.name: known.get(path.name) or sha256(path) for path in files}


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_sums(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes the SHA-256 of every file in `folder`, as `digests` has them, to SHA256SUMS there. Those that are `known`,
    by name, are not read again.
    """
    lines = [f"{digest}  {name}\n" for name, digest in digests(folder, known).items()]
    with atomic_write(folder / SUMS, "w") as f:
        f.writelines(lines)


def read_sums(folder: Path) -> dict[str, str] | None:
    """The SHA-256 of each file that SHA256SUMS lists, by name; None where SHA256SUMS is damaged."""
    content = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    if not re.fullmatch(f"({SUMS_LINE.pattern})+", content):
        return None
    return {name: digest for digest, name in SUMS_LINE.findall(content)}


def weights_sha256(folder: Path) -> str | None:
    """What tells the weights of a checkpoint from others: the SHA-256 of its part of SHA256SUMS. None where there is
    no such file, or it is damaged.
    """
    sums = read_sums(folder) if (folder / SUMS).is_file() else None
    parts = "".join(f"{digest}  {name}\n" for name, digest in sorted((sums or {}).items()) if WEIGHTS.fullmatch(name))
    return hashlib.sha256(parts.encode()).hexdigest() if parts else None


def summed(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that SHA256SUMS lists."""
    return [name for name in names if name in (read_sums(folder) or {})]


def verify(folder: Path, *names: str) -> None:
    """Raises `InputError` unless the files of these names, or all that SHA256SUMS lists, are what it says."""
    if fault := damage(folder, *names):
        meant = (
            f"if that was meant, run `python -m data.runs.accept {shlex.quote(str(folder))}`; if not, "
            if fault.may_be_meant
            else ""
        )
        raise InputError(f"{fault.words}; {meant}{remedy(folder)}")


def damage(folder: Path, *names: str) -> Fault | None:
    """What is wrong with the files that `verify` looks at; None if nothing is."""
    if not (folder / SUMS).is_file():
        return Fault(f"{folder} is no whole checkpoint ({SUMS} is missing)")
    sums = read_sums(folder)
    if sums is None:
        return Fault(f"{folder / SUMS} is damaged")
    for name in names or sums:
        path = folder / name
        if not path.is_file():
            return Fault(f"{path} is missing", may_be_meant=True)
        if sha256(path) != sums.get(name):
            if words := unreadable(path):
                return Fault(words)
            return Fault(f"{path} differs from what was written (its SHA-256 is not the one in {SUMS})", True)
    return None


def unreadable(path: Path) -> str | None:
    """Why a file cannot be what its name says, so that nobody has edited but something has damaged it; else None."""
    try:
        if path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix == ".json":
            read_json(path)
    except InputError as e:
        return str(e).partition("; ")[0]
    return None


def remedy(folder: Path) -> str:
    """What to do about a damaged checkpoint: take the newest good one of its run, if there is one."""
    others = (other for other in reversed(checkpoints(folder.parent)) if other != folder)
    good = next((other for other in others if not damage(other)), None)
    return f"the newest good checkpoint of the run is {good}, pass that" if good else "download or copy it again"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, by their steps."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
