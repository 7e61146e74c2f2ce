"""The certificate: it depends on every source and weight, and says what was found."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests import certificate
from parity_tests.bounds import Row
from parity_tests.mutants import CONFIG
from parity_tests.setting import Setting
from parity_tests.weights import random_weights

Arrays = dict[str, np.ndarray]


def rows_of(**errors: float) -> list[Row]:
    return [Row("gradient", name, error, error, 1.0, 1.0, 2.0) for name, error in errors.items()]


def test_a_changed_byte_of_any_source_changes_the_certificate(tmp_path: Path) -> None:
    for package in certificate.PACKAGES:
        shutil.copytree(certificate.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = certificate.sources(tmp_path)
    assert before == certificate.sources()
    files = [p for p in tmp_path.rglob("*") if p.suffix in (".py", ".c", ".h") or p.name == "zig-clang"]
    tests = [p for p in files if "test" in p.name or {"tests", "catalogue"} & {*p.parts} or p.name == "conftest.py"]
    assert len(tests) > 40
    assert before.keys() == {p.relative_to(tmp_path).as_posix() for p in {*files} - {*tests}}
    needed = {"torch_ref/model.py", "tinygrad_impl/cpu.py", "tinygrad_impl/gemm.c", "tinygrad_impl/decode.c"}
    needed |= {"tinygrad_impl/kernels/fused.py", "data/text/sampling.py", "parity_tests/bounds.py"}
    needed |= {"tinygrad_impl/zig-clang", "tinygrad_impl/vectors.h", "tinygrad_impl/attention.c"}
    assert needed <= before.keys()
    for name in before:
        content = bytearray((tmp_path / name).read_bytes() or b" ")
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
    after = certificate.sources(tmp_path)
    assert after.keys() == before.keys()
    assert not {*after.items()} & {*before.items()}


def test_what_a_certificate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "revision", lambda: {"commit": "ab" * 20, "clean": False})
    weights = random_weights(CONFIG, 0, 0.2)

    def made(rows: list[Row], dtype: str = "float32", changed: Arrays | None = None) -> dict[str, Any]:
        setting = Setting(CONFIG, weights | (changed or {}), dtype, "CPU")
        return certificate.certificate(setting, rows, "someone", seed=7)

    good = rows_of(a=1.0, b=2.0)
    c = made(good)
    assert (c["verdict"], c["culprit"], c["multiple"], c["seed"]) == ("equal", "someone", 2.0, 7)
    assert c["revision"] == {"commit": "ab" * 20, "clean": False}
    assert c["model"]["parameters"] == sum(array.size for array in weights.values())
    assert c["rows"][1] == vars(good[1]) | {"ratio": 2.0, "passed": True}
    assert made([*good, *rows_of(c=2.1)])["verdict"] == "different"
    assert made([])["verdict"] == "different"
    assert [made(good, dtype)["multiple"] for dtype in ("float64", "bfloat16")] == [None, 1.5]
    bias = weights["ln_f.bias"].copy()
    bias[3] = np.nextafter(bias[3], np.float32(1))
    assert made(good, changed={"ln_f.bias": bias})["model"]["sha256"] != c["model"]["sha256"]
    assert made(good)["model"]["sha256"] == c["model"]["sha256"]
