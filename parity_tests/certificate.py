"""The certificate: what was proven, of which weights, with which sources and packages, as JSON."""

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.config import parameter_count, to_hf
from data.runs.revision import revision
from parity_tests.bounds import MULTIPLE, Row
from parity_tests.setting import Setting

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "parity_tests", "tinygrad_impl", "torch_ref")
NO_SOURCES = ("tests", "catalogue", "conftest.py", "testing.py")  # nor files named test_*: no result depends on them


def certificate(setting: Setting, rows: Sequence[Row], culprit: str | None, **more: Any) -> dict[str, Any]:
    """The verdict and the rows, with all that they depend on, and `more`."""
    weights = hashlib.sha256()
    for name, array in sorted(setting.arrays.items()):
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(array).data)
    equal = bool(rows) and all(row.passed for row in rows)
    return {
        "verdict": "equal" if equal else "different",
        "culprit": culprit,
        "model": {
            "config": to_hf(setting.config),
            "parameters": parameter_count(setting.config),
            "sha256": weights.hexdigest(),
        },
        "revision": revision(),
        **programs(),
        "dtype": setting.dtype,
        "multiple": MULTIPLE.get(setting.dtype),
        **more,
        "rows": [vars(row) | {"ratio": row.ratio, "passed": row.passed} for row in rows],
    }


def programs() -> dict[str, Any]:
    """Of which programs a certificate is: the hashes of the sources, and the versions of the packages."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "tinygrad", "numpy")}
    return {"sources": sources(), "versions": {"python": platform.python_version()} | versions}


def sources(root: Path = ROOT) -> dict[str, str]:
    """The SHA-256 of every source file that computes something, by its path in the repository."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root)
            code = path.suffix in (".py", ".c", ".h") or path.name == "zig-clang"
            if code and not path.name.startswith("test_") and not {*inside.parts} & {*NO_SOURCES}:
                found[inside.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def as_json(certificate: Mapping[str, Any]) -> str:
    """The certificate as JSON, which knows no infinity and no NaN: they become null."""
    rows = [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        for row in certificate["rows"]
    ]
    return json.dumps({**certificate, "rows": rows}, indent=1, allow_nan=False) + "\n"
