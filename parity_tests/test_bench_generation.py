"""`python -m parity_tests.bench_generation`: its figures, what its options do, and what it refuses."""

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tinygrad import dtypes

from data.checkpoints.config import PRESETS, GPT2Config
from data.testing import call, refused
from parity_tests import bench_generation
from tinygrad_impl.backend import Plain


def clock() -> Iterator[float]:
    """For two sizes of batches, tinygrad and transformers by turns: what begins and ends takes so many seconds."""
    ours, theirs = (9, 1, 4, 2, 7, 8, 16, 4), (5, 3, 8, 1, 6, 1, 2, 2)
    taken = [seconds for pair in zip(ours, theirs, strict=True) for seconds in pair]
    return accumulate((1.0, *(s for seconds in taken for s in (float(seconds), 0.5))))


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are of the median turn after the first; tokens are those of all rows."""
    config = GPT2Config(vocab_size=50257, n_layer=1, n_head=2, n_embd=16, n_positions=32)
    monkeypatch.setitem(bench_generation.PRESETS, "tiny", config)
    times = clock()
    monkeypatch.setattr(bench_generation, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    argv = ("--preset", "tiny", "--device", "CPU", "--batch-size", 2, "--batch-size", 3, "--max-new-tokens", 8)
    result = call(bench_generation.main, *argv, "--json", "found.json", "--dtype", "float32", cwd=tmp_path)
    assert result.code == 0, result
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    two, three = rows
    assert (two["rows"], two["new_tokens"], two["same_tokens"]) == (2, 8, True)
    assert (three["rows"], three["new_tokens"], three["same_tokens"]) == (3, 8, True)
    assert two["tinygrad_tokens_per_second"] == pytest.approx(16 / 2)
    assert two["transformers_tokens_per_second"] == pytest.approx(16 / 3)
    assert three["tinygrad_tokens_per_second"] == pytest.approx(24 / 8)
    assert three["transformers_tokens_per_second"] == pytest.approx(24 / 2)
    assert (two["ratio"], three["ratio"]) == (pytest.approx(1.5), pytest.approx(0.25))
    first = [(row["tinygrad_first_seconds"], row["transformers_first_seconds"]) for row in rows]
    assert first == [(9, 5), (7, 6)]
    assert "tiny in float32, plain kernels, on CPU" in result.out
    assert "3 rows of 8 new tokens" in result.out
    assert [line.split() for line in result.out.splitlines() if line.startswith(("tinygrad ", "transformers"))] == [
        ["tinygrad", "8.0", "9.0", "s"],
        ["transformers", "5.3", "1.50", "x", "5.0", "s"],
        ["tinygrad", "and", "transformers", "wrote", "the", "same", "tokens"],
        ["tinygrad", "3.0", "7.0", "s"],
        ["transformers", "12.0", "0.25", "x", "6.0", "s"],
        ["tinygrad", "and", "transformers", "wrote", "the", "same", "tokens"],
    ]


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has torch compile its model, once, and reports its rate beside the others."""
    config = GPT2Config(vocab_size=50257, n_layer=2, n_head=2, n_embd=16, n_positions=32)
    monkeypatch.setitem(bench_generation.PRESETS, "tiny", config)
    modes = []

    def compiled(call: Any, mode: str, **_: Any) -> Any:
        modes.append(mode)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    argv = ("--preset", "tiny", "--device", "CPU", "--max-new-tokens", 4, "--dtype", "float32", "--compiled")
    result = call(bench_generation.main, *argv, "--json", "found.json", cwd=tmp_path)
    assert result.code == 0, result
    assert modes == ["reduce-overhead"]
    [row] = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    ours, theirs = row["tinygrad_tokens_per_second"], row["compiled_transformers_tokens_per_second"]
    assert row["compiled_ratio"] == pytest.approx(ours / theirs)
    assert f"{theirs:,.1f}" in result.out


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrives where it acts, with a value that is no default."""
    asked: list[Any] = []

    def measure(*given: Any) -> list[dict[str, Any]]:
        asked.append(given)
        return []

    opened: list[Any] = []

    def open_device(name: str | None) -> str:
        opened.append(name)
        return "CPU"

    monkeypatch.setattr(bench_generation, "open_device", open_device)
    monkeypatch.setattr(bench_generation, "measure", measure)
    result = call(bench_generation.main, cwd=tmp_path)
    assert result.code == 0, result
    assert (asked[-1], opened[-1]) == ((PRESETS["gpt2"], "CPU", Plain(), [1], 64, False), None)
    argv = ("--preset", "tinystories", "--device", "NAME", "--dtype", "bfloat16", "--max-new-tokens", 9, "--compiled")
    result = call(bench_generation.main, *argv, "--batch-size", 4, "--batch-size", 7, cwd=tmp_path)
    assert result.code == 0, result
    assert asked[-1] == (PRESETS["tinystories"], "CPU", Plain(dtypes.bfloat16), [4, 7], 9, True)
    assert opened[-1] == "NAME"
    assert "tinystories in bfloat16, plain kernels" in result.out
    assert call(bench_generation.main, "--max-new-tokens", 1, "--batch-size", 1, cwd=tmp_path).code == 0
    assert asked[-1][-3:] == ([1], 1, False)


def test_bad_options(tmp_path: Path) -> None:
    refused(
        call(bench_generation.main, "--preset", "tiny", cwd=tmp_path),
        "tiny has room for 16; give fewer --max-new-tokens",
    )
    refused(call(bench_generation.main, "--batch-size", "0", cwd=tmp_path), "--batch-size")
    refused(call(bench_generation.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
