"""A run that one implementation began is gone on with by the other, and `transformers` takes any checkpoint of it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tinygrad import Tensor

import tinygrad_impl.train
import torch_ref.train
import torch_ref.trainer
from data.checkpoint import load
from data.config import GPT2Config
from data.run_folder import RunFolder, load_checkpoint, read_metrics, read_sealed
from data.testing import call, refused, save_model, write_stories
from data.tokenizer import EOT_TEXT, tokenizer
from data.training import PORTS
from parity_tests.assertions import assert_passed
from parity_tests.proof import Setting, judge, random_batches
from parity_tests.weights import random_weights
from tinygrad_impl.model import GPT2
from torch_ref.testing import hugging_face

CONFIG = GPT2Config(vocab_size=199, n_positions=16, n_embd=32, n_layer=2, n_head=4)
STEPS = 20


@pytest.mark.parametrize("first", ["torch_ref", "tinygrad_impl"])
def test_ten_steps_here_and_ten_there_are_twenty(first: str, tmp_path: Path) -> None:
    """Through a checkpoint on disk, in float64: to the bound of ten free steps, twice."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float64", "CPU")
    batches = random_batches(CONFIG, 2, 12, seed=3, count=STEPS)
    whole, reference = setting.references()
    begun: Any = reference
    gone_on: Any = setting.trainer()
    if first == "tinygrad_impl":
        begun, gone_on = gone_on, begun
    for i, batch in enumerate(batches):
        rate = torch_ref.trainer.learning_rate(i, STEPS, 1e-3, 1e-4, 2)
        whole.step([batch], rate)
        if i == STEPS // 2:
            state = {"step": i, "tokens": 0, "seconds": 0.0, "loader": {}, "options": {}}
            moments = {name: np.asarray(t) for name, t in begun.moments().items()}
            out = RunFolder.create(tmp_path / "run", {})
            folder = out.save_checkpoint(CONFIG, begun.model.arrays(), moments, state)
            _, arrays, moments, read = load_checkpoint(folder)
            gone_on.restore(arrays, moments, read["step"])
        (begun if i < STEPS // 2 else gone_on).step([batch], rate)
    assert begun.steps == STEPS // 2
    assert whole.steps == gone_on.steps == STEPS
    expected, found = ({**t.model.arrays(), **t.moments()} for t in (whole, gone_on))
    assert_passed(judge("training", "float64", [(expected, found, expected)], None, setting.exact))


MAINS = {"torch_ref": torch_ref.train.main, "tinygrad_impl": tinygrad_impl.train.main}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by each implementation, `torch_ref` and `tinygrad_impl`."""
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "init")
    write_stories(folder / "stories.txt")
    options = {"init": "init", "data": "stories.txt", "steps": 8, "batch-size": 2, "seq-len": 16, "grad-accum": 2}
    options |= {"lr": 0.01, "warmup": 1, "eval-every": 4, "eval-tokens": 64, "sample-every": 4, "save-every": 4}
    argv = [word for name, value in (options | {"device": "CPU"}).items() for word in (f"--{name}", value)]
    for package, main in MAINS.items():
        more = ("--parity", "off") * (package == "tinygrad_impl")
        result = call(main, *argv, *more, "--out", package, cwd=folder)
        assert result.code == 0, result
    return folder


def assert_close(found: Path, expected: Path) -> None:
    """Of runs in float32, which go apart by their rounding."""
    rows = [read_metrics(run) for run in (found, expected)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["tokens"], ours.get("lr")) == (theirs["tokens"], theirs.get("lr"))
        for name in ours.keys() & {"loss", "val_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_the_two_commands_train_the_same(runs: Path) -> None:
    assert_close(runs / "tinygrad_impl", runs / "torch_ref")
    options = [read_sealed(runs / package / "run.json")["options"] for package in MAINS]
    assert options[0] == {name: value for name, value in options[1].items() if name not in PORTS}


@pytest.mark.parametrize(("first", "second"), [("torch_ref", "tinygrad_impl"), ("tinygrad_impl", "torch_ref")])
def test_either_goes_on_with_a_run_of_the_other(first: str, second: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / first, tmp_path / "run")
    result = call(MAINS[second], "--resume", tmp_path / "run" / "checkpoints" / "step-4", cwd=runs)
    assert result.code == 0, result
    assert "continuing after step 4" in result.out
    assert read_metrics(tmp_path / "run")[:5] == read_metrics(runs / first)[:5]
    assert_close(tmp_path / "run", runs / first)
    (continued,) = read_sealed(tmp_path / "run" / "run.json")["continued"]
    assert continued["command"][2] == f"{second}.train"


def test_the_reference_resumes_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "torch_ref", tmp_path / "run")
    assert call(torch_ref.train.main, "--resume", tmp_path / "run" / "checkpoints" / "step-4", cwd=runs).code == 0
    times = {"seconds", "tokens_per_second"}
    courses = [
        [{k: v for k, v in row.items() if k not in times} for row in read_metrics(run)]
        for run in (tmp_path / "run", runs / "torch_ref")
    ]
    assert courses[0] == courses[1]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (run / "checkpoints" / "step-8" / file for run in (tmp_path / "run", runs / "torch_ref"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_reference_refuses_a_device_it_has_not(runs: Path) -> None:
    refused(call(torch_ref.train.main, "--device", "METAL", cwd=runs), "PyTorch has no device METAL here")


@pytest.mark.parametrize("package", list(MAINS))
def test_any_checkpoint_is_a_folder_for_transformers(package: str, runs: Path) -> None:
    """Logits to float32's rounding, and the tokenizer that is written beside the weights."""
    folder = runs / package / "checkpoints" / "step-8"
    text = "Once upon a time, naïve 日本 🙂 don't"
    ids = tokenizer().encode_ordinary(text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token == EOT_TEXT
    assert transformers.GPT2Tokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    with torch.no_grad():
        expected = hugging_face(folder, torch.float32)(torch.tensor([ids])).logits.numpy()
    found = GPT2(*load(folder))(Tensor([ids]))[0].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_text_generation_pipeline_takes_a_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = transformers.pipeline("text-generation", str(runs / "tinygrad_impl" / "checkpoints" / "step-8"))
    (written,) = pipeline("Once upon a time", max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith("Once upon a time")
    assert len(tokenizer().encode_ordinary(written["generated_text"])) > 4


@pytest.mark.parametrize("package", list(MAINS))
def test_what_is_not_finite_updates_nothing(package: str) -> None:
    """A weight that overflows in the loss: nothing of parameters, moments and steps may move."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    trainer: Any = setting.trainer() if package == "tinygrad_impl" else setting.references()[1]
    batches = random_batches(CONFIG, 2, 12, seed=0, count=4)
    for batch in batches[:3]:  # the third is replayed
        trainer.step([batch], 1e-3)
    arrays, moments = trainer.model.arrays(), {n: np.asarray(t).copy() for n, t in trainer.moments().items()}
    poisoned = arrays | {"ln_f.bias": arrays["ln_f.bias"] + np.float32(3e38)}
    trainer.restore(poisoned, moments, 3)
    loss, norm = trainer.step([batches[3]], 1e-3)
    assert not np.isfinite(loss + norm)
    assert trainer.steps == 3
    for name, array in trainer.model.arrays().items():
        np.testing.assert_array_equal(array, poisoned[name])
    for name, array in trainer.moments().items():
        np.testing.assert_array_equal(np.asarray(array), moments[name])
    trainer.restore(arrays, moments, 3)
    assert np.isfinite(trainer.step([batches[3]], 1e-3)).all()
    assert trainer.steps == 4
