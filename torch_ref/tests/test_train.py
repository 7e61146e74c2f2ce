"""The reference's training command: what it trains with. What comes of it is for data/runs/tests and parity_tests."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.cli import counted
from data.runs.implementation import Implementation
from data.runs.run_folder import RunFolder
from data.runs.start import Start
from data.testing import call, refused, save_model, write_tokens
from data.text.sampling import Sampler
from data.text.tokenizer import tokenizer
from torch_ref import train
from torch_ref.generate import generate

OPTIONS: dict[str, object] = {"init": "init", "data": "data", "out": "run", "steps": 5, "batch-size": 2, "seq-len": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run."""
    folder = tmp_path_factory.mktemp("train")
    save_model(folder / "init")
    tokens = np.random.default_rng(0).integers(0, 50257, 600)
    write_tokens(folder / "data", tokens[:400], tokens[400:])
    return folder


def prepared_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[Start, Implementation, dict[str, Any]]:
    """What the loop would be given."""
    caught: list[Any] = []
    monkeypatch.setattr(train, "train", lambda start, by, files: caught.append((start, by, files)))
    result = call(train.main, *words, cwd=folder)
    assert result.code == 0, result
    return caught[0]


def given(**changed: object) -> list[object]:
    return [word for name, value in (OPTIONS | changed).items() for word in (f"--{name.replace('_', '-')}", value)]


def test_the_options_arrive_in_what_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = given(weight_decay=0.3, clip=0.7, dtype="bfloat16", device="cpu")
    _, by, files = prepared_training(folder, monkeypatch, *words, "--betas", 0.6, 0.7)
    trainer: Any = by.trainer
    groups = [(g["betas"], g["eps"], g["weight_decay"]) for g in trainer.optimizer.param_groups]
    assert groups == [((0.6, 0.7), 1e-8, 0.3), ((0.6, 0.7), 1e-8, 0.0)]
    assert (trainer.clip, trainer.autocast, trainer.device, trainer.steps) == (0.7, torch.bfloat16, "cpu", 0)
    assert (by.package, by.device, by.kernels, by.peak_flops, files) == ("torch_ref", "CPU", None, None, {})
    assert by.device_name == f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    for name, array in load(folder / "init")[1].items():
        np.testing.assert_array_equal(trainer.model.arrays()[name], array)


def test_what_is_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, by, _ = prepared_training(folder, monkeypatch, *given(dtype="float32", device="CPU"))
    trainer: Any = by.trainer
    assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert (trainer.clip, trainer.autocast) == (1.0, None)


def test_what_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt, and what the sampler draws after it; after no prompt, what comes after the end of a text."""
    _, by, _ = prepared_training(folder, monkeypatch, *given(device="CPU"))
    model: Any = by.trainer.model
    for prompt, ids in (("Once upon a time", tokenizer().encode_ordinary("Once upon a time")), ("", [50256])):
        drawn = generate(model, [ids], 5, Sampler(0.6, top_k=40, seed=3))[0]
        assert len(drawn) == 5
        ticks = count()
        text = by.continue_text(prompt, 5, Sampler(0.6, top_k=40, seed=3), ticks.__next__)
        assert text == prompt + tokenizer().decode(drawn)
        assert next(ticks) == 5


def test_a_resumed_trainer_has_the_state_of_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = given(out=tmp_path / "run", data=folder / "data", device="CPU")
    start, by, _ = prepared_training(folder, monkeypatch, *words)
    arrays = {name: array + 1 for name, array in start.arrays.items()}
    moments = {f"{m}.{name}": a + i for i, m in enumerate(("exp_avg", "exp_avg_sq"), 2) for name, a in arrays.items()}
    run = RunFolder.create(tmp_path / "run", start.described())
    run.add_metrics({"step": 0, "val_loss": 1.0})
    for step in (1, 2, 3):
        run.add_metrics({"step": step, "loss": 1.0})
    state = {"step": 3, "tokens": 96, "seconds": 1.5, "loader": start.loader.state()}
    run.save_checkpoint(start.config, arrays, moments, state | {"options": start.options.recorded()})
    start, by, _ = prepared_training(folder, monkeypatch, "--resume", tmp_path / "run")
    assert by.trainer.steps == start.state["step"] == 3
    for ours, theirs in ((by.arrays(True), arrays), (by.moments(True), moments)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_what_is_saved_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while it is written. On a CPU, what PyTorch hands to numpy is the optimizer's own memory."""
    start, by, _ = prepared_training(folder, monkeypatch, *given(device="CPU"))
    for _ in range(2):  # before the first step there are no moments yet
        found = by.arrays(True) | by.moments(True)
        before = {name: array.copy() for name, array in found.items()}
        by.trainer.step(start.loader.next_micro_batches(1), 0.1)
        for name, array in found.items():
            np.testing.assert_array_equal(array, before[name])
    assert any(array.any() for name, array in before.items() if name.startswith("exp_avg."))
    assert (by.arrays(False), by.moments(False)) == ({}, {})


def test_find_lr_does_not_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(train, "find_learning_rate", lambda *given: found.append(given))
    words = [word for word in given() if word not in ("--steps", OPTIONS["steps"])]
    assert call(train.main, *words, "--find-lr", cwd=folder).code == 0
    assert [(start.options.find_lr, by.package) for start, by in found] == [(True, "torch_ref")]


def test_the_device_is_the_best_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = "CUDA" if torch.cuda.is_available() else "CPU"
    _, by, _ = prepared_training(folder, monkeypatch, *given())
    assert by.device == best


@pytest.mark.parametrize("device", ["METAL", "cuda"])
def test_a_device_it_has_not(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(os.listdir(folder))
    words = f"PyTorch has no device {device!r} here; leave --device out for the best there is"
    refused(call(train.main, *given(device=device), cwd=folder), words)
    assert sorted(os.listdir(folder)) == before


def test_a_model_of_a_smaller_vocabulary(folder: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_layer=1, n_head=1, n_embd=4, n_positions=32)
    save(tmp_path / "init", config, initial_weights(config, 0))
    words = "has no tokenizer", "and a vocabulary of 300, so it is not GPT-2's either; copy"
    refused(call(train.main, *given(init=tmp_path / "init", out=tmp_path / "run"), cwd=folder), *words)
    assert not (tmp_path / "run").exists()


def test_it_has_no_options_of_the_port(folder: Path) -> None:
    refused(call(train.main, *given(parity="off"), cwd=folder), "unrecognized arguments: --parity off")
