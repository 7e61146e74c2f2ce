"""The gate of the training command: what it proves, keeps and prints, and what it refuses, by name."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import GPT2Config, parameter_shapes
from data.run_folder import read_metrics
from data.testing import Result, call, refused, save_model, write_tokens
from parity_tests.proof import GRAPH_BATCHES, MORE
from tinygrad_impl import functional, gate, train

CONFIG = GPT2Config(vocab_size=99, n_layer=1, n_head=2, n_embd=16, n_positions=32)
B, T, ACCUM = 2, 16, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: weights of a small vocabulary, and tokens of it."""
    folder = tmp_path_factory.mktemp("gate")
    save_model(folder / "init", CONFIG)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 1200)
    write_tokens(folder / "data", tokens[:1000], tokens[1000:])
    return folder


@pytest.fixture(autouse=True)
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's vocabulary is larger than the model's, which writes nothing here."""
    monkeypatch.setattr(train, "Generator", lambda *_: None)
    monkeypatch.setattr(train, "write", lambda generator, prompts, *_: [f"{prompts[0]} it was."])


def training(folder: Path, out: Path | str, **changed: object) -> Result:
    values: dict[str, object] = {"init": "init", "data": "data", "steps": 3, "batch_size": B, "seq_len": T}
    values |= {"grad_accum": ACCUM, "lr": 0.02, "warmup": 1, "eval_every": 3, "eval_tokens": 64, "save_every": 2}
    values |= {"device": "CPU", "parity": "on", "out": out} | changed
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    return call(train.main, *words, cwd=folder)


def course(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read_metrics(run)]


@pytest.fixture(scope="module")
def ungated(folder: Path) -> list[dict[str, Any]]:
    """The course of a run that nothing was asked of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Generator", lambda *_: None)
        patch.setattr(train, "write", lambda generator, prompts, *_: [f"{prompts[0]} it was."])
        result = training(folder, "ungated", parity="off")
    assert result.code == 0, result
    return course(folder / "ungated")


def test_the_gate(folder: Path, ungated: list[dict[str, Any]]) -> None:
    """What it prints and keeps, in a new run and in a resumed one; and that it leaves no trace in what is trained."""
    result = training(folder, "gated")
    assert result.code == 0, result
    assert course(folder / "gated") == ungated
    proof = json.loads((folder / "gated" / "parity.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"parity: 16 gradients within \d\.\dx of torch's own float32 error \(\d+ s\)", proof["summary"])
    assert result.out.splitlines().count(proof["summary"]) == 1
    assert (proof["verdict"], proof["culprit"], proof["dtype"], proof["device"]) == ("equal", None, "float32", "CPU")
    assert (proof["batch_size"], proof["seq_len"]) == (B, T)
    names = {(row["check"], row["name"]) for row in proof["rows"]}
    for name in parameter_shapes(CONFIG):
        assert {("gradient", name), ("training", name), ("training", f"exp_avg_sq.{name}")} <= names
    assert all(row["passed"] and row["error"] <= row["allowed"] for row in proof["rows"])


def test_the_gate_refuses_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "gelu", lambda x, approximate: 0.5 * x * (1 + (x / 2**0.5).erf()))
    result = training(folder, "refused")
    refused(result, "does not compute what PyTorch does: h.0.mlp.gelu forward: error", "--parity off")
    assert not (folder / "refused").exists()
    assert "parity:" not in result.out


def test_the_gate_asks_again_what_may_be_luck(
    folder: Path, ungated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more batches, after which it trains as if it had not been asked."""
    judged, asked = gate.gradient_rows, []

    def unlucky(setting: Any, port: Any, references: Any, groups: list[Any], nudges: int) -> list[Any]:
        rows = judged(setting, port, references, groups, nudges)
        asked.append(sum(map(len, groups)))
        if len(asked) == 1:
            rows[0].error = 1.1 * rows[0].allowed
        return rows

    monkeypatch.setattr(gate, "gradient_rows", unlucky)
    result = training(folder, "unlucky")
    assert result.code == 0, result
    assert asked == [GRAPH_BATCHES, MORE * GRAPH_BATCHES]
    assert course(folder / "unlucky") == ungated


def test_without_the_gate_training_says_so(folder: Path) -> None:
    result = training(folder, "without", parity="off", steps=1)
    assert result.code == 0, result
    assert "PARITY NOT CHECKED (--parity off)" in result.out
    assert not (folder / "without" / "parity.json").exists()


def test_the_gate_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    refused(training(folder, "refused"), "needs PyTorch; `pip install torch`, or pass --parity off")
    assert not (folder / "refused").exists()
