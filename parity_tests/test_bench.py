"""`python -m parity_tests.bench`: what it reports, and what it refuses."""

import json
from pathlib import Path

import pytest

from data.config import GPT2Config
from data.testing import call, refused
from parity_tests import bench


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_report(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=50257, n_layer=1, n_head=2, n_embd=16, n_positions=32)
    monkeypatch.setitem(bench.PRESETS, "tiny", config)
    options = {"preset": "tiny", "device": "CPU", "batch-size": 2, "max-new-tokens": 8, "json": "found.json"}
    options |= {"dtype": dtype}
    result = call(
        bench.main, *(str(word) for name, value in options.items() for word in (f"--{name}", value)), cwd=tmp_path
    )
    assert result.code == 0, result
    (row,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (row["rows"], row["new_tokens"]) == (2, 8)
    assert row["same_tokens"] or dtype == "bfloat16"
    ours, theirs = (row[f"{name}_tokens_per_second"] for name in ("tinygrad", "transformers"))
    assert row["ratio"] == pytest.approx(ours / theirs)
    assert min(ours, theirs, row["tinygrad_first_seconds"], row["transformers_first_seconds"]) > 0
    assert f"{ours:,.1f}" in result.out
    assert f"tiny in {dtype}, plain kernels, on CPU" in result.out


def test_bad_options(tmp_path: Path) -> None:
    refused(call(bench.main, "--preset", "tiny", cwd=tmp_path), "tiny has room for 16; give fewer --max-new-tokens")
    refused(call(bench.main, "--batch-size", "0", cwd=tmp_path), "--batch-size")
    refused(call(bench.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
