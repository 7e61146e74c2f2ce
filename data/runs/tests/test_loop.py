"""The loop, its files and its lines: each number against what it has to be for losses and times that a test made up."""

import json
import math
import re
import struct
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorboardX
from tensorboardX.proto import event_pb2

import data.evaluation.scores
import data.runs.start
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import PRESETS, GPT2Config
from data.checkpoints.sums import weights_sha256
from data.evaluation.subject import Subject
from data.runs.loop import Smoothed
from data.runs.run_folder import load_checkpoint, read_sealed
from data.runs.start import checksum
from data.runs.tests.conftest import NameOnly
from data.runs.tests.support import (
    A_STEP,
    ACCUM,
    CARD,
    SEED,
    SOURCE,
    STEPS,
    TINY,
    TRAIN,
    VALID,
    B,
    Drawing,
    Stub,
    T,
    clocked,
    drawings,
    metrics,
    options,
    place_in,
    trained,
    training,
    wait_for_saving,
    window,
    windows_of_step,
)
from data.testing import Result, call, refused, write_tokens
from data.text.loader import IGNORED
from data.text.shards import read_meta

LOSSES = [4 - n / 8 + 0.25 * (n % 3) for n in range(STEPS + 1)]  # of step n; that of 0 is none
SECONDS = [0.0] + [1.25 * n + 0.0004 for n in range(1, STEPS)] + [0.0307]
PARITY = {"verdict": "equal", "dtype": "float32", "device": "CPU", "summary": "parity: all of it"}
VALIDATION = {0: 5.25, 4: 5.5, 8: 2.0, 12: 2.5, 13: 2.375}  # neither is the last the best nor the first the worst


@dataclass
class Through:
    stub: Stub
    folder: Path
    result: Result
    drawn: list[Drawing]

    @property
    def run(self) -> Path:
        return self.folder / "run"


def scripted(stub: Stub) -> Stub:
    stub.loss, stub.seconds, stub.validation = LOSSES.__getitem__, SECONDS.__getitem__, VALIDATION.__getitem__
    return stub


def smoothed(losses: list[float]) -> float:
    """The mean that forgets: each loss weighs 0.98 times the next."""
    return float(np.average(losses, weights=0.98 ** np.arange(len(losses))[::-1]))


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Through:
    folder = place_in(tmp_path_factory.mktemp("through"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        stub, drawn = scripted(clocked(monkeypatch)), drawings(monkeypatch)
        stub.peak_flops, stub.kernels, stub.files = 1e8, "plain", {"parity.json": PARITY}
        return Through(stub, folder, trained(stub, folder, "run"), drawn)


def test_metrics(through: Through) -> None:
    expected: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 5.25}]
    for n in range(1, STEPS + 1):
        row = {"step": n, "loss": LOSSES[n], "lr": 0.02 / n, "grad_norm": 1 + n / 4, "tokens": 48 * n}
        row |= {"seconds": round(sum(SECONDS[: n + 1]), 3), "tokens_per_second": round(48 / SECONDS[n], 1)}
        expected.append(row | ({"val_loss": VALIDATION[n]} if n in VALIDATION else {}))
    assert metrics(through.run) == expected
    assert A_STEP == 48


def test_the_schedule_is_asked_for_the_rate_of_each_step(through: Through) -> None:
    assert through.stub.asked == [(n, STEPS, 0.02, 0.003, 2) for n in range(STEPS)]
    assert [lr for _, lr in through.stub.stepped] == [0.02 / n for n in range(1, STEPS + 1)]


def test_the_steps_see_the_training_text(through: Through) -> None:
    """In the order that the seed decides, in as many micro-batches as asked for."""
    assert len(through.stub.stepped) == STEPS
    for n, (batches, _) in enumerate(through.stub.stepped, 1):
        assert [x.shape for x, _ in batches] == [y.shape for _, y in batches] == [(B, T)] * ACCUM
        expected = [window(i) for i in windows_of_step(n)]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), [x for x, _ in expected])
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), [y for _, y in expected])


def test_validation_is_on_the_first_tokens_of_the_other_split(through: Through) -> None:
    """40 of them: a batch of 24, and one of 16 and padding."""
    assert [step for step, _ in through.stub.validated] == list(VALIDATION)
    for _, batches in through.stub.validated:
        (x, y), (x2, y2) = batches
        np.testing.assert_array_equal(np.concatenate([x.ravel(), x2.ravel()[:16]]), VALID[:40])
        np.testing.assert_array_equal(np.concatenate([y.ravel(), y2.ravel()[:16]]), VALID[1:41])
        assert x2.shape == y.shape == (B, T)
        assert (y2.ravel()[16:] == IGNORED).all()


def test_validation_on_the_whole_split(stub: Stub, place: Path, tmp_path: Path) -> None:
    trained(stub, place, tmp_path / "run", steps=1, eval_tokens=0)
    for _, batches in stub.validated:
        targets = np.concatenate([y.ravel() for _, y in batches])
        np.testing.assert_array_equal(targets[targets != IGNORED], VALID[1:])


def test_samples(through: Through) -> None:
    texts = {step: f"Once upon a time it was {step}." for step in (0, 5, 10, 13)}
    assert (through.run / "samples.md").read_text(encoding="utf-8") == "".join(
        f"## Step {step}\n\n{text}\n\n---\n\n" for step, text in texts.items()
    )
    for (step, prompt, tokens, sampler), expected in zip(through.stub.sampled, texts, strict=True):
        assert (step, prompt, tokens) == (expected, "Once upon a time", 160)
        assert (sampler.temperature, sampler.top_k, sampler.top_p) == (0.6, 40, None)
        assert sampler.random.random() == np.random.default_rng(SEED).random()  # anew for every sample


def test_checkpoints(through: Through) -> None:
    """On schedule, the last, and the best although it is neither; what was best once is not kept."""
    kept = {path.name for path in (through.run / "checkpoints").iterdir()}
    assert kept == {"latest", "best"} | {f"step-{n}" for n in (0, 3, 6, 8, 9, 12, 13)}
    assert (through.run / "checkpoints" / "latest").read_text() == "step-13\n"
    assert (through.run / "checkpoints" / "best").read_text() == "step-8\n"


def test_what_a_checkpoint_holds(through: Through) -> None:
    config, arrays, moments, state = load_checkpoint(through.run / "checkpoints" / "step-9")
    assert config == TINY
    assert (state["step"], state["tokens"]) == (9, 432)
    assert state["seconds"] == pytest.approx(sum(SECONDS[:10]), abs=1e-9)
    assert (state["loader"]["position"], state["loader"]["seed"], state["loader"]["split"]) == (54, SEED, "train")
    assert state["options"] == read_sealed(through.run / "run.json")["options"]
    p, m, v = load(through.folder / "init")[1]["ln_f.bias"], np.zeros(8, np.float32), np.zeros(8, np.float32)
    for n in range(1, 10):  # what the stub does with a step
        shown = np.mean([window(i)[0] for i in windows_of_step(n)[:B]])
        m, v = 0.5 * m + np.float32(shown), v + np.float32(1 + n / 4)
        p = 0.5 * p + np.float32(0.02 / n) * m
    np.testing.assert_array_equal(arrays["ln_f.bias"], p)
    np.testing.assert_array_equal(moments["exp_avg.ln_f.bias"], m)
    np.testing.assert_array_equal(moments["exp_avg_sq.ln_f.bias"], v)


def test_step_0_is_what_training_began_with(through: Through) -> None:
    given, began = (load(path)[1] for path in (through.folder / "init", through.run / "checkpoints" / "step-0"))
    for name, array in given.items():
        np.testing.assert_array_equal(began[name], array)


def test_what_is_printed(through: Through) -> None:
    assert through.result.out.splitlines() == [
        f"GPT-2, 0.0M parameters, from init; {CARD}, float32, plain kernels",
        "data: data, 500 tokens; 13 steps of 48; run: run",
        "before training: validation loss 5.250 (150 s with compiling, a sample and a checkpoint)",
        "",
        "--- before training (step 0) ---",
        "Once upon a time it was 0.",
        "",
        "--- after 13 steps (step 13) ---",
        "Once upon a time it was 13.",
        "",
        "Validation loss 5.250 -> 2.375, 98 s of training. All of it is in run; try:",
        "  python -m tinygrad_impl.generate --model run --prompt 'Once upon a time'",
    ]
    assert sum(SECONDS) == pytest.approx(97.54, abs=0.01)


def test_progress(through: Through) -> None:
    """The figures of the last step, with the mean of all losses, and the FLOPs of 1,376 weights and of attention."""
    *before, first, last = through.result.err.splitlines()
    assert re.fullmatch(r"training: +0%\|.*\| 0/13 \[.*step/s\]", first)
    mean, rate = smoothed(LOSSES[1:]), 48 / 0.0307
    mfu = (6 * 1376 + 12 * 8 * T) * rate / 1e8
    figures = f"loss {LOSSES[13]:.3f} ({mean:.3f}), val 2.375, lr 1.5e-03, 1,564 tok/s, MFU {100 * mfu:.1f}%]"
    assert last.startswith("training: 100%|")
    assert " 13/13 [" in last
    assert last.endswith(f", {figures}")
    assert f"{mean:.3f}" not in (f"{LOSSES[13]:.3f}", f"{np.mean(LOSSES[1:]):.3f}")
    assert f"{100 * mfu:.1f}" == "14.1"
    # what training waits for is shown before it, with how much there is, and in it only where it takes long
    assert [re.sub(r"\|.*\| (.*) \[.*", r" \1", line) for line in before] == [
        "validation loss:   0% 0/2",
        "validation loss: 100% 2/2",
        "a sample:   0% 0/160",
        "a sample:   2% 3/160",
    ]


def test_progress_without_a_known_peak(stub: Stub, place: Path, tmp_path: Path) -> None:
    result = trained(scripted(stub), place, tmp_path / "run", eval_every=8, steps=12)
    assert re.search(r"val 2\.500, lr 1\.7e-03, 3 tok/s\]$", result.err.splitlines()[-1])


def test_the_last_validation_stands_in_the_bar_until_the_next(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("data.cli.Progress.set_postfix_str", lambda self, text, refresh: shown.append(text))
    trained(scripted(stub), place, tmp_path / "run")
    expected = [5.25] * 3 + [5.5] * 4 + [2.0] * 4 + [2.5, 2.375]
    assert [text.split(", ")[1] for text in shown] == [f"val {loss:.3f}" for loss in expected]
    means = [smoothed(LOSSES[1 : n + 1]) for n in range(1, STEPS + 1)]
    assert [text.split(", ")[0] for text in shown] == [
        f"loss {loss:.3f} ({mean:.3f})" for loss, mean in zip(LOSSES[1:], means, strict=True)
    ]


def test_loss_png(through: Through) -> None:
    last = through.drawn[-1]
    steps = list(range(1, STEPS + 1))
    assert last.lines["training (a batch)"] == (steps, LOSSES[1:])
    assert last.lines["validation"] == (list(VALIDATION), list(VALIDATION.values()))
    assert last.legend == list(last.lines) == ["training (a batch)", "validation"]
    title = "init, 0.0M parameters, on data"  # what was trained on what: a run's name may be a date
    assert (last.title, last.xlabel, last.ylabel) == (title, "step", "loss (nats a token)")
    # with every checkpoint after the first, the best ones (8) included
    assert [len(drawing.lines["training (a batch)"][0]) for drawing in through.drawn] == [3, 6, 8, 9, 12, 13]
    header = (through.run / "loss.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", header[16:]) == (960, 600)


def test_run_json(through: Through) -> None:
    said = read_sealed(through.run / "run.json")
    assert said["options"] == {
        "preset": None,
        "init": "init",
        "data": "data",
        **{"valid": None, "field": "text", "errors": "strict"},
        "steps": 13,
        "batch_size": 3,
        "seq_len": 8,
        "grad_accum": 2,
        "lr": 0.02,
        "min_lr": 0.003,
        "warmup": 2,
        "schedule": None,
        **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_positions")),
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "dtype": "float32",
        "seed": 11,
        "device": None,
        "eval_every": 4,
        "eval_tokens": 40,
        "sample_every": 5,
        "save_every": 3,
        "keep": None,
        "tensorboard": False,
    }
    assert said["command"] == ["python", "-m", "torch_ref.train", *map(str, options(out="run"))]
    assert (said["device"], said["card"], said["kernels"], said["seed"]) == ("CPU", CARD, "plain", 11)
    assert said["source"] == SOURCE
    # 1,632 parameters but for 32 positions of 8, and attention in 8 tokens of 8
    assert (said["peak_flops"], said["flops_a_token"]) == (1e8, 6 * (1632 - 32 * 8) + 12 * 8 * 8)
    assert said["versions"].keys() == {"python", "torch", "numpy", "tiktoken", "safetensors"}
    assert said["versions"]["numpy"] == np.__version__
    assert said["versions"]["torch"] == version("torch")
    assert (said["config"]["n_positions"], said["parameters"]) == (32, 1632)
    assert said["data"] == {"folder": "data", "checksum": read_meta(through.folder / "data")["checksum"]}
    assert said["sampling"] == {"temperature": 0.6, "top_k": 40, "top_p": None, "seed": 11, "max_new_tokens": 160}
    assert "continued" not in said
    assert read_sealed(through.run / "parity.json") == PARITY


def test_run_json_of_the_port(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.package = "tinygrad_impl"
    trained(stub, place, tmp_path / "run", steps=1)
    said = read_sealed(tmp_path / "run" / "run.json")
    assert said["command"][:3] == ["python", "-m", "tinygrad_impl.train"]
    assert said["versions"]["tinygrad"] == version("tinygrad")
    assert said["versions"].keys() == {"python", "tinygrad", "numpy", "tiktoken", "safetensors"}
    assert "kernels" not in said  # where there is no choice


def test_the_checksum_of_the_weights_tells_weights_apart(stub: Stub, place: Path, tmp_path: Path) -> None:
    sums = []
    for i, change in enumerate([None, ("ln_f.bias", 1.0), ("ln_f.weight", 1.0)]):
        config, arrays = load(place / "init")
        if change:
            arrays[change[0]] = arrays[change[0]] + change[1]
        save(tmp_path / f"init{i}", config, arrays)
        trained(stub, place, tmp_path / f"run{i}", steps=1, init=tmp_path / f"init{i}")
        sums.append(read_sealed(tmp_path / f"run{i}" / "run.json")["weights"])
    assert len(set(sums)) == 3
    x, y = np.zeros(3), np.ones(3)
    assert len({checksum(arrays) for arrays in ({"a": x, "b": y}, {"a": y, "b": x}, {"c": x, "d": y})}) == 3


@pytest.mark.parametrize(("seq_len", "noted"), [(31, True), (32, False)])
def test_the_first_lines_of_a_preset(
    seq_len: int, noted: bool, stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", GPT2Config(vocab_size=61, n_positions=32, n_embd=128, n_layer=6, n_head=2))
    changed = {"init": None, "preset": "tiny", "steps": 1, "batch_size": 1, "seq_len": seq_len, "data": place / "data"}
    result = trained(stub, tmp_path, "run", **changed)
    lines = result.out.splitlines()
    assert lines[0] == f"tiny, 1.2M parameters, from random; {CARD}, float32"
    assert lines[1] == f"data: {place / 'data'}, 500 tokens; 1 steps of {2 * seq_len}; run: run"
    note = "note: positions from 31 on stay untrained, as --seq-len is below 32"
    assert (note in lines) == noted == any(line.startswith("note") for line in lines)


def test_thousands_are_told_apart(stub: Stub, place: Path, tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "data", np.arange(1500), VALID)
    result = trained(stub, place, tmp_path / "run", steps=1, batch_size=30, grad_accum=5, data=data)
    assert "1,500 tokens; 1 steps of 1,200; run:" in result.out


def test_given_weights_need_no_note(stub: Stub, place: Path, tmp_path: Path) -> None:
    assert "note:" not in trained(stub, place, tmp_path / "run", steps=1).out


@pytest.mark.parametrize(("changed", "name"), [({}, "finetune"), ({"init": "random", "preset": "tiny"}, "tiny")])
def test_a_run_without_a_name_is_named_after_its_time(
    changed: dict[str, object], name: str, stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "20261126-143055"))
    result = trained(stub, tmp_path, None, **{"init": place / "init", "data": place / "data", "steps": 1} | changed)
    assert f"All of it is in runs/{name}-20261126-143055; try:" in result.out
    assert (tmp_path / "runs" / f"{name}-20261126-143055" / "run.json").exists()


def test_quiet(stub: Stub, place: Path, tmp_path: Path) -> None:
    result = trained(stub, place, tmp_path / "run", quiet=True)
    assert (result.out, result.err) == ("", "")
    assert len(metrics(tmp_path / "run")) == STEPS + 1
    assert "quiet" not in read_sealed(tmp_path / "run" / "run.json")["options"]


# --keep


def kept(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, {0, 6, 12}), (2, {0, 6, 10, 12}), (3, {0, 6, 8, 10, 12}), (5, {0, 4, 6, 8, 10, 12})],
)
def test_keep_is_of_the_newest_by_number(
    keep: int, expected: set[int], stub: Stub, place: Path, tmp_path: Path
) -> None:
    """Of steps 2, 4, ..., 12; as text, 10 and 12 come before 2. Step 6 is the best."""
    stub.validation = lambda step: abs(step - 6.0)
    trained(stub, place, tmp_path / "run", steps=12, eval_every=2, save_every=2, keep=keep)
    assert kept(tmp_path / "run") == expected


def test_the_last_step_counts_among_the_newest(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Of 3, 6, 9, 12 and 13 two are kept, and besides them the best."""
    trained(scripted(stub), place, tmp_path / "run", keep=2)
    assert kept(tmp_path / "run") == {0, 8, 12, 13}


def test_keep_while_the_run_goes_on(stub: Stub, place: Path, tmp_path: Path) -> None:
    """After each step: the first, the newest scheduled, and the best; the newest best even where it is off schedule."""
    found: list[set[int]] = []

    def look(step: int) -> None:
        wait_for_saving()
        found.append(kept(tmp_path / "run"))

    stub.during = look
    losses = dict(enumerate([9.0, 5.0, 6.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5]))
    stub.validation = losses.__getitem__
    trained(stub, place, tmp_path / "run", steps=10, eval_every=1, save_every=5, keep=1)
    first = {0}
    assert found == [first, {0, 1}, {0, 1}, {0, 3}, {0, 3}, {0, 3, 5}, {0, 3, 5}, {0, 3, 5}, {0, 3, 5}, {0, 3, 5}]
    assert kept(tmp_path / "run") == {0, 3, 10}


def test_of_equally_good_ones_the_first_is_best(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.validation = lambda step: 5.0 - min(step, 4)
    trained(stub, place, tmp_path / "run", eval_every=2, save_every=2, keep=1, steps=8)
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step-4\n"
    assert kept(tmp_path / "run") == {0, 4, 8}


def test_the_untrained_model_may_be_best(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.validation = lambda step: 1.0 + step
    trained(stub, place, tmp_path / "run", eval_every=2, save_every=3, steps=4)
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step-0\n"
    assert kept(tmp_path / "run") == {0, 3, 4}


# Spikes


def test_the_smoothed_loss() -> None:
    mean = Smoothed()
    assert math.isnan(mean.value)
    losses = [3.0, 2.0, 4.0, 1.5, 2.25]
    for n, loss in enumerate(losses, 1):
        assert not mean.add(loss)
        assert mean.value == pytest.approx(smoothed(losses[:n]), rel=1e-12)
    assert mean.count == 5


def usual_distance(losses: list[float]) -> float:
    """The mean that forgets of how far each loss was from the mean of those before it, 0 for the first."""
    distances = [0.0] + [abs(losses[n] - smoothed(losses[:n])) for n in range(1, len(losses))]
    return smoothed(distances)


@pytest.mark.parametrize("before", [20, 60])
def test_a_spike_is_eight_times_the_usual_distance(before: int) -> None:
    losses = [3 - 0.01 * n + 0.1 * (-1) ** n + 0.05 * (n % 3) for n in range(before)]
    edge = smoothed(losses) + 8 * usual_distance(losses)
    for loss, spike in ((edge + 1e-6, True), (edge - 1e-6, False), (2 * smoothed(losses) - edge - 1, False)):
        mean = Smoothed()
        assert not any(mean.add(loss) for loss in losses)
        assert mean.add(loss) is spike


def test_nineteen_losses_do_not_tell_what_is_usual() -> None:
    mean = Smoothed()
    assert not any([mean.add(3.0) for _ in range(19)])
    assert not mean.add(1000.0)
    mean = Smoothed()
    assert not any([mean.add(3.0) for _ in range(20)])
    assert mean.add(3.1)  # next to no noise at all


def test_a_spike_is_told(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: 2 + 0.1 * (step % 2) + 5 * (step == 40)
    result = trained(stub, place, tmp_path / "run", steps=50, sample_every=99, save_every=99, eval_every=99)
    usual = smoothed([2 + 0.1 * (step % 2) for step in range(1, 40)])
    assert [line for line in result.out.splitlines() if "jumped" in line] == [
        f"step 40: the loss jumped from about {usual:.3f} to 7.000, on windows 234 to 239 of the data"
    ]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "spike" in row] == [40]
    assert rows[40]["spike"] is True


# What is not finite


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf), (2.0, math.nan), (math.inf, math.inf)]
)
def test_what_is_not_finite_ends_training(loss: float, norm: float, stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: loss if step == 5 else 3.0
    stub.norm = lambda step: norm if step == 5 else 1.0
    result = training(stub, place, tmp_path / "run")
    assert result.code == 2
    assert result.errors == [
        f"error: the loss is {loss} and the gradient's norm {norm} at step 5, on windows 24 to 29 of the data; the "
        f"weights were left as they were, and {tmp_path}/run/checkpoints/step-4 has those before; look at the data "
        f"there, or begin again with `--config {tmp_path}/run` and an --lr below 0.02"
    ]
    assert result.err.endswith(result.errors[0] + "\n")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert kept(tmp_path / "run") == {0, 3, 4}
    assert len(stub.stepped) == 5


# TensorBoard


def events(run: Path) -> list[Any]:
    """As TensorBoard reads them: each with its length and two checksums around it."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard(stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    flush = tensorboardX.SummaryWriter.flush

    def count(self: Any) -> None:
        flushed.append(1)
        flush(self)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "flush", count)
    trained(scripted(stub), place, tmp_path / "run", tensorboard=True)
    scalars: dict[tuple[str, int], float] = {}
    texts = {}
    starts = []
    for event in events(tmp_path / "run"):
        starts += [event.step] if event.HasField("session_log") else []
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[event.step] = value.tag, value.tensor.string_val[0].decode()
            else:
                scalars[value.tag, event.step] = value.simple_value
    expected: dict[tuple[str, int], float] = {("val_loss", step): loss for step, loss in VALIDATION.items()}
    for n in range(1, STEPS + 1):
        row = {"loss": LOSSES[n], "lr": 0.02 / n, "grad_norm": 1 + n / 4, "tokens_per_second": 48 / SECONDS[n]}
        expected |= {(name, n): value for name, value in row.items()}
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        rounded = key[0] == "tokens_per_second"  # to one digit, as in the metrics
        assert scalars[key] == (pytest.approx(value, abs=0.06) if rounded else pytest.approx(value, rel=1e-6))
    assert {step: tag.split("/")[0] for step, (tag, _) in texts.items()} == dict.fromkeys((0, 5, 10, 13), "sample")
    assert all(text == f"Once upon a time it was {step}." for step, (_, text) in texts.items())
    assert starts == [1]  # what was shown from here on is of a run that was cut off
    assert len(flushed) >= 7  # with each checkpoint


def test_tensorboard_only_where_asked_for(through: Through) -> None:
    assert not (through.run / "tensorboard").exists()


def test_json_is_one_object_a_line(through: Through) -> None:
    lines = (through.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))


def test_too_few_windows(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Of 8 tokens the 500 have 62."""
    trained(stub, place, tmp_path / "run", steps=1, batch_size=31)
    words = "the train split of data has 62 windows of 8 tokens, fewer than the 64 of a batch"
    refused(training(stub, place, tmp_path / "other", batch_size=32), words)
    assert len(TRAIN) == 500


def test_tasks_are_scored_with_each_validation(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the weights of that step; the columns are in metrics.jsonl and in TensorBoard. The last are kept as those of
    `evaluate`, with standard errors, of which some would take long.
    """
    asked = with_tasks(stub, monkeypatch)
    trained(stub, place, tmp_path / "run", eval_tasks="stories", eval_limit=5, eval_every=4, steps=9, tensorboard=True)
    assert asked == [["stories"], *[(7, 5, False)] * 3, (7, 5, True)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r["stories/acc"] for r in rows if "stories/acc" in r} == {0: 0.02, 4: 0.03, 8: 0.04, 9: 0.05}
    assert all(("val_loss" in row) == ("stories/acc" in row) for row in rows)
    [events] = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"stories/acc" in events.read_bytes()
    said = read_sealed(tmp_path / "run" / "run.json")["options"]
    assert (said["eval_tasks"], said["eval_limit"]) == ("stories", 5)
    [kept] = read_sealed(tmp_path / "run" / "evaluation.json")["rows"]
    assert (kept["value"], kept["stderr"], kept["step"], kept["by"]) == (0.05, 0.5, 9, "torch_ref")
    assert kept["weights"] == weights_sha256(tmp_path / "run" / "checkpoints" / "step-9")


def with_tasks(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has a harness that gives a score of its own each time. Returns a list of what it is asked."""
    asked: list[Any] = []

    class Tasks:
        def __init__(self, specs: Any, context: int):
            asked.append([spec.name for spec in specs])
            assert context == TINY.n_positions

        def __call__(self, subject: Any, limit: int, stderr: bool, **show: Any) -> Any:
            asked.append((subject.context, limit, stderr))
            assert show == {"part": True, "disable": False}
            score = {"acc,none": len(asked) / 100, "acc_stderr,none": 0.5, "alias": "stories"}
            return {"results": {"stories": score}, "n-samples": {}}

    monkeypatch.setitem(sys.modules, "data.evaluation.harness", SimpleNamespace(Tasks=Tasks))
    monkeypatch.setattr(data.runs.start, "require_harness", lambda: None)
    monkeypatch.setattr(data.evaluation.scores.importlib.metadata, "version", lambda name: "1")
    stub.subject = Subject(None, None, None, context=7, batch_tokens=1)  # type: ignore[arg-type]
    return asked


def test_all_of_a_task_before_training_and_after_it(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a 0; then every so often, whenever validation is."""
    asked, run = with_tasks(stub, monkeypatch), tmp_path / "run"
    more: dict[str, Any] = {"eval_tasks": "stories", "eval_limit": 0, "eval_tasks_every": 0, "eval_every": 1}
    printed = trained(stub, place, run, steps=3, **more)
    assert asked == [["stories"], (7, None, False), (7, None, True)]
    assert "\n\nstories/acc 0.0200 -> 0.0300\n\nValidation loss" in printed.out
    asked[:] = []
    assert call(stub.main, "--resume", run, "--steps", 8, "--eval-tasks-every", 2, cwd=place).code == 0
    assert asked == [["stories"], (7, None, False), (7, None, False), (7, None, True)]


def test_trying_learning_rates_needs_no_tasks(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_tasks(stub, monkeypatch)
    trained(stub, place, tmp_path / "run", eval_tasks="stories", steps=1)
    asked.clear()
    assert call(stub.main, "--config", tmp_path / "run", "--find-lr", cwd=place).code == 0
    assert asked == []


def test_what_is_wrong_with_tasks_is_said_first(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Before anything is read, with the way out."""
    result = training(stub, place, tmp_path / "run", eval_tasks="hellaswag", eval_data_file="none.jsonl", data="gone")
    first = "there is no file none.jsonl" if find_spec("lm_eval") else "evaluation needs lm_eval"
    refused(result, first, "or train without scores on tasks: --eval-tasks none")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_numbers_are_refused(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Before any loss of theirs is laid to the data or to the learning rate, and before they are saved."""
    config, arrays = load(place / "init")
    arrays["wpe.weight"][3, 1] = np.nan
    save(tmp_path / "nan", config, arrays, NameOnly({}))
    result = training(stub, place, tmp_path / "run", init=tmp_path / "nan")
    refused(result, f"{tmp_path}/nan: of the 256 values of wpe.weight, NaN or infinity: 1;", "give others")
    assert not (tmp_path / "run").exists()
