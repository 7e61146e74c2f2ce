"""The gate of the training command: what it proves, keeps and prints, and what it refuses, by name."""

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import data.runs.start
from data.checkpoints.config import GPT2Config, parameter_shapes
from data.ranks import ALONE
from data.runs.run_folder import read_metrics
from data.testing import Result, call, refused, save_model, write_tokens
from data.text.tokenizer import gpt2
from parity_tests import gate, mutants
from parity_tests.proof import MORE
from tinygrad_impl import functional, train
from tinygrad_impl.trainer import Trainer

CONFIG = replace(mutants.CONFIG, n_layer=1)  # of the proof's shapes, whose kernels are compiled once for all tests
B, T, ACCUM, STEPS = mutants.ROWS, mutants.LENGTH, 5, 3
BETAS, DECAY, CLIP = (0.8, 0.99), 0.3, 0.5  # none of them a default
BATCHES = ACCUM + 4  # one more than a user's step, one micro-batch and two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: weights of a small vocabulary, and tokens of it."""
    folder = tmp_path_factory.mktemp("gate")
    save_model(folder / "init", CONFIG)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 1200)
    write_tokens(folder / "data", tokens[:1000], tokens[1000:])
    return folder


def training(folder: Path, out: Path | str, *more: object, **changed: object) -> Result:
    """The command, but for what it writes: the tokenizer's vocabulary is larger than the model's."""
    values: dict[str, object] = {"init": "init", "data": "data", "steps": STEPS, "batch_size": B, "seq_len": T}
    values |= {"grad_accum": ACCUM, "lr": 0.02, "warmup": 1, "eval_every": 3, "eval_tokens": 64, "save_every": 2}
    values |= {"weight_decay": DECAY, "clip": CLIP, "device": "CPU", "parity": "on", "out": out} | changed
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.runs.start, "of_folder", lambda *_: gpt2())
        patch.setattr(train, "Generator", lambda *_: None)
        patch.setattr(train, "continue_texts", lambda generator, tokenizer, prompts, *_: [f"{prompts[0]} it was."])
        return call(train.main, *(more or (*words, "--betas", *BETAS)), cwd=folder)


def course(run: Path) -> list[dict[str, Any]]:
    """The metrics but for the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read_metrics(run)]


@pytest.fixture(scope="module")
def ungated(folder: Path) -> list[dict[str, Any]]:
    """The course of a run without the gate."""
    result = training(folder, "ungated", parity="off")
    assert result.code == 0, result
    assert "PARITY NOT CHECKED (--parity off)" in result.out
    assert not (folder / "ungated" / "parity.json").exists()
    return course(folder / "ungated")


def certified(run: Path, result: Result) -> dict[str, Any]:
    """What the gate left in the run, if it is as it should be."""
    proof = json.loads((run / "parity.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"parity: 16 gradients within \d\.\dx of torch's own float32 error \(\d+ s\)", proof["summary"])
    assert result.out.splitlines().count(proof["summary"]) == 1
    ratios = [row["ratio"] for row in proof["rows"] if row["check"] == "gradient" and not row["reason"]]
    assert f"within {max(ratios):.1f}x" in proof["summary"]
    assert abs(int(proof["summary"].rpartition("(")[2].partition(" ")[0]) - proof["seconds"]) < 0.6  # each is rounded
    assert (proof["verdict"], proof["culprit"], proof["dtype"], proof["device"]) == ("equal", None, "float32", "CPU")
    assert (proof["batch_size"], proof["seq_len"], proof["grad_accum"]) == (B, T, ACCUM)
    assert proof["batches"] == BATCHES
    assert proof["model"]["config"]["layer_norm_epsilon"] == CONFIG.layer_norm_epsilon
    names = {(row["check"], row["name"]) for row in proof["rows"]}
    for name in parameter_shapes(CONFIG):
        assert {("gradient", name), ("training", name), ("training", f"exp_avg_sq.{name}")} <= names
    for name in ("loss inf", "loss nan", "norm inf", "norm nan"):
        assert ("training", name) in names
    assert all(row["passed"] and row["error"] <= row["allowed"] for row in proof["rows"])
    return proof


def test_the_gate(folder: Path, ungated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints and keeps, in a new run and in one that goes on; and it leaves no trace in what is trained."""
    monkeypatch.setattr(gate, "GRAPH_BATCHES", BATCHES)
    result = training(folder, "gated")
    assert result.code == 0, result
    assert course(folder / "gated") == ungated
    lines = result.err.splitlines()  # at once, and at the end: three steps, and four groups
    assert lines[0].startswith("parity (compiling):   0%|")
    assert " 0/7 [" in lines[0]
    assert any(line.startswith("parity: 100%|") and " 7/7 [" in line for line in lines)
    first = certified(folder / "gated", result)
    stopped = folder / "stopped"
    shutil.copytree(folder / "gated", stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS}")
    (stopped / "checkpoints" / "latest").write_text("step-2\n")
    result = training(folder, "", "--resume", "stopped")
    assert result.code == 0, result
    assert course(stopped) == ungated
    assert certified(stopped, result)["model"]["sha256"] != first["model"]["sha256"]


def test_the_gate_takes_the_batches_that_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step of the user's, one micro-batch and two, then each by itself; and steps of them, on both sides of
    the norm that clips.
    """
    seen: dict[str, Any] = {}

    def steps(setting: Any, port: Any, references: Any, taken: Iterable[Any], norms: list[float | None]) -> list[Any]:
        seen.update(steps=list(taken), norms=norms)
        return []

    def gradients(setting: Any, port: Any, references: Any, groups: Iterable[Any], nudges: int) -> list[Any]:
        seen.update(groups=list(groups))
        raise RuntimeError("enough")

    monkeypatch.setattr(gate, "GRAPH_BATCHES", ACCUM + 5)
    monkeypatch.setattr(gate, "step_rows", steps)
    monkeypatch.setattr(gate, "not_finite_rows", lambda port: [])
    monkeypatch.setattr(gate, "gradient_rows", gradients)
    with pytest.raises(RuntimeError, match="enough"):
        training(folder, "unseen")
    assert [len(group) for group in seen["groups"]] == [ACCUM, 1, 2, 1, 1]
    assert [len(batches) for batches, *_ in seen["steps"]] == [ACCUM, 1, 2]
    assert [rates for _, *rates in seen["steps"]] == [[0.02, 0.02], [0.01, 0.01], [0.02, 0.02]]
    assert seen["norms"] == [None, 2 * CLIP, CLIP / 2]
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 1200)[:1000]
    order = np.random.default_rng((1337, 0)).permutation((len(tokens) - 1) // T)
    xs, ys = (np.concatenate([pair[i] for group in seen["groups"] for pair in group]) for i in range(2))
    assert len(xs) == (ACCUM + 5) * B
    for window, x, y in zip(order, xs, ys, strict=False):
        np.testing.assert_array_equal(x, tokens[window * T : window * T + T])
        np.testing.assert_array_equal(y, tokens[window * T + 1 : window * T + T + 1])


def test_nothing_is_added_where_a_step_takes_one_micro_batch() -> None:
    """Then no graph that trains adds gradients to others, and none is captured for the gate's sake."""
    taken: Any = SimpleNamespace(
        options=SimpleNamespace(lr=0.02), ranks=ALONE, micro_batches=1, loader=SimpleNamespace(next_micro_batches=range)
    )
    groups, steps = gate.user_steps(taken, 8)
    assert [len(group) for group in groups] == [1] * 8
    assert [len(batches) for batches, *_ in steps] == [1, 1, 2]


def test_the_gate_refuses_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "gelu", lambda x, approximate: 0.5 * x * (1 + (x / 2**0.5).erf()))
    result = training(folder, "refused")
    refused(result, "does not compute what PyTorch does: h.0.mlp.gelu forward: error", "--parity off")
    assert not (folder / "refused").exists()
    assert "parity:" not in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": (0.9, 0.95)}, "betas: it has (0.9, 0.95), and was asked for (0.8, 0.99)"),
        ({"eps": 1e-6}, "eps: it has 1e-06, and was asked for 1e-08"),
        ({"weight_decay": 0.1}, "weight_decay: it has 0.1, and was asked for 0.3"),
        ({"clip": 1.0}, "clip: it has 1.0, and was asked for 0.5"),
        ({"arrays": "ln_f.bias"}, "ln_f.bias: it does not begin with those it was given"),
    ],
)
def test_the_gate_refuses_a_trainer_of_other_options(
    options: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the command with others than its user asked for."""

    def made(config: GPT2Config, arrays: dict[str, np.ndarray], **given: Any) -> Trainer:
        if name := options.get("arrays"):
            arrays = arrays | {name: np.nextafter(arrays[name], np.float32(9))}
        return Trainer(config, arrays, **given | {k: v for k, v in options.items() if k != "arrays"})

    monkeypatch.setattr(train, "Trainer", made)
    refused(training(folder, "refused"), f"PyTorch does: {words}; nothing was trained")


@pytest.mark.parametrize(("moment", "words"), [("exp_avg", "exp_avg."), ("steps", "steps: it has 0")])
def test_the_gate_refuses_a_trainer_that_goes_on_from_elsewhere(
    moment: str, words: str, folder: Path, ungated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Trainer.restore

    def forgetful(self: Trainer, arrays: Any, moments: dict[str, Any], steps: int) -> None:
        forgotten = {n: a * 0 if n.startswith(f"{moment}.") else a for n, a in moments.items()}
        restore(self, arrays, forgotten, 0 if moment == "steps" else steps)

    stopped = folder / f"stopped-{moment}"
    shutil.copytree(folder / "ungated", stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS}")
    (stopped / "checkpoints" / "latest").write_text("step-2\n")
    monkeypatch.setattr(Trainer, "restore", forgetful)
    refused(training(folder, "", "--resume", stopped.name, "--parity", "on"), f"PyTorch does: {words}")


def with_others(name: str, value: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer's function, as if it had been written with a value in place of what it was made with."""

    def changed(self: Trainer, *args: Any) -> Any:
        kept = getattr(self, name)
        setattr(self, name, value)
        try:
            return function(self, *args)
        finally:
            setattr(self, name, kept)

    return changed


def two_at_most(self: Trainer, batches: list[Any]) -> None:
    accumulate(self, batches[:2])
    self.count = len(batches)


def careless(self: Trainer, lr: float) -> tuple[float, float]:
    """Updates whatever the norm is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "isfinite", lambda value: not math.isnan(value))
        return update(self, lr)


accumulate, update = Trainer.accumulate, Trainer.update


@pytest.mark.parametrize(
    ("function", "planted", "rows"),
    [
        ("adamw", with_others("betas", (0.9, 0.95), Trainer.adamw), {"exp_avg.wte.weight", "exp_avg_sq.wte.weight"}),
        ("update", with_others("clip", 1.0, Trainer.update), {"exp_avg.wte.weight"}),
        ("accumulate", two_at_most, {"wte.weight", "loss"}),
        ("update", careless, {"loss inf", "norm inf"}),
    ],
    ids=["betas", "clip", "a third micro-batch", "infinity"],
)
def test_the_gate_judges_by_what_was_asked(
    function: str, planted: Any, rows: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer has the options that were asked for, and computes with others."""

    def find_culprit(setting: Any, failed: list[Any], batches: Any, steps: int, **asked: Any) -> str:
        assert asked == {"betas": BETAS, "eps": 1e-8, "weight_decay": DECAY, "clip": CLIP}
        assert rows <= {row.name for row in failed}
        return "someone"

    monkeypatch.setattr(Trainer, function, planted)
    monkeypatch.setattr(gate, "find_culprit", find_culprit)
    refused(training(folder, "refused"), "PyTorch does: someone; nothing was trained")


def test_the_gate_compares_near_misses_again(
    folder: Path, ungated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more batches, after which it trains as if nothing had been compared."""
    judged, asked = gate.gradient_rows, []

    def near_miss(setting: Any, port: Any, references: Any, groups: Iterable[Any], nudges: int) -> list[Any]:
        groups = list(groups)
        rows = judged(setting, port, references, groups, nudges)
        asked.append((sum(map(len, groups)), nudges))
        if len(asked) == 1:
            rows[0].error = 1.1 * rows[0].allowed
        return rows

    monkeypatch.setattr(gate, "gradient_rows", near_miss)
    monkeypatch.setattr(gate, "GRAPH_BATCHES", 3)
    result = training(folder, "again")
    assert result.code == 0, result
    assert asked == [(ACCUM + 3, 0), (MORE * 3, gate.NUDGES)]
    assert course(folder / "again") == ungated
    assert json.loads((folder / "again" / "parity.json").read_text(encoding="utf-8"))["batches"] == MORE * 3


def test_the_gate_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    refused(training(folder, "refused"), "needs PyTorch; `pip install torch`, or pass --parity off")
    assert not (folder / "refused").exists()
