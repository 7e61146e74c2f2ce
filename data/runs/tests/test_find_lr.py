"""--find-lr: what it tries, where it stops, and what it proposes, of losses whose course the tests know."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data.checkpoints.config import PRESETS
from data.cli import InputError
from data.runs.options import Given, parse, parser
from data.runs.tests.support import (
    ACCUM,
    SEED,
    TINY,
    B,
    Stub,
    drawings,
    resume,
    trained,
    training,
    window,
    windows_of_step,
)
from data.testing import refused

RATES = [10 ** (-6 + 6 * i / 99) for i in range(100)]


def course(step: int) -> float:
    """Falls fastest about 1e-3, and grows from 1e-2 on."""
    lr = RATES[step - 1]
    return 6 - 2 * math.tanh(math.log10(lr / 1e-3)) + 20 * max(0.0, lr - 1e-2)


def smoothed(losses: list[float]) -> list[float]:
    """Means in which each loss weighs 0.9 times the next."""
    return [float(np.average(losses[: n + 1], weights=0.9 ** np.arange(n + 1)[::-1])) for n in range(len(losses))]


def test_what_it_proposes(stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawings(monkeypatch)
    stub.loss = course
    result = trained(stub, place, tmp_path / "found", find_lr=True)
    means = smoothed([course(n) for n in range(1, 101)])
    (stop,) = [n for n in range(1, 101) if means[n - 1] > 1.5 * min(means[:n])][:1]
    losses, means, rates = [course(n) for n in range(1, stop + 1)], means[:stop], RATES[:stop]
    lowest = int(np.argmin(means))
    # the slope of a point from both its neighbours
    steepest = min(range(1, lowest), key=lambda i: means[i + 1] - means[i - 1])
    assert 50 < steepest < lowest < stop < 100
    proposed = float(f"{rates[steepest]:.1e}")
    assert 5e-4 < proposed < 5e-3

    found = json.loads((tmp_path / "found" / "find-lr.json").read_text(encoding="utf-8"))
    assert found.keys() == {"proposed", "lr", "loss", "smoothed", "options"}
    assert found["proposed"] == proposed
    assert found["loss"] == losses
    np.testing.assert_allclose(found["lr"], rates, rtol=1e-12)
    np.testing.assert_allclose(found["smoothed"], means, rtol=1e-12)
    assert found["options"]["seed"] == SEED
    assert "find_lr" not in found["options"]
    assert [lr for _, lr in stub.stepped] == found["lr"]
    assert result.out.splitlines() == [
        f"the loss falls fastest at a learning rate of {proposed:.1e}, and is lowest at {rates[lowest]:.1e}: "
        f"{tmp_path}/found",
        f"  to train with it, give --lr {proposed:.1e} in place of --find-lr, and a new --out if one was given",
    ]
    assert f" {stop}/100 [" in result.err.splitlines()[-1]
    assert f"lr {rates[-1]:.1e}, loss {losses[-1]:.3f}]" in result.err.splitlines()[-1]

    (picture,) = drawn
    assert picture.legend == list(picture.lines) == ["loss (a batch)", "smoothed", f"proposed: {proposed:.1e}"]
    assert picture.lines["loss (a batch)"] == (found["lr"], found["loss"])
    assert picture.lines["smoothed"] == (found["lr"], found["smoothed"])
    assert picture.lines[f"proposed: {proposed:.1e}"][0] == [proposed, proposed]
    assert (picture.xlabel, picture.ylabel, picture.xscale) == ("learning rate", "loss (nats a token)", "log")
    assert (tmp_path / "found" / "find-lr.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "found" / "run.json").exists()


def test_it_sees_the_batches_that_training_would(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = course
    trained(stub, place, tmp_path / "found", find_lr=True)
    for n, (batches, _) in enumerate(stub.stepped[:20], 1):
        assert [x.shape for x, _ in batches] == [(B, 8)] * ACCUM
        expected = [window(i) for i in windows_of_step(n)]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), [x for x, _ in expected])
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), [y for _, y in expected])


def test_to_the_last_rate_where_the_loss_never_grows(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: 8.0 - step / 25 - 2 / (1 + math.exp(50 - step))
    result = trained(stub, place, tmp_path / "found", find_lr=True)
    found = json.loads((tmp_path / "found" / "find-lr.json").read_text(encoding="utf-8"))
    assert len(found["lr"]) == len(found["loss"]) == 100
    assert found["lr"][0] == pytest.approx(1e-6)
    assert found["lr"][-1] == pytest.approx(1.0)
    assert "and is lowest at 1.0e+00: " in result.out
    assert "100/100 [" in result.err.splitlines()[-1]


def test_the_lowest_loss_counts_among_those_that_fall(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Here it falls faster and faster, up to the last rate, which is proposed."""
    stub.loss = lambda step: 20.0 - step * step / 1000
    trained(stub, place, tmp_path / "found", find_lr=True)
    assert json.loads((tmp_path / "found" / "find-lr.json").read_text(encoding="utf-8"))["proposed"] == 1.0


def test_it_ends_where_the_loss_is_no_number(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: 8.0 - step / 10 if step < 30 else math.nan
    trained(stub, place, tmp_path / "found", find_lr=True)
    found = json.loads((tmp_path / "found" / "find-lr.json").read_text(encoding="utf-8"))
    assert len(found["lr"]) == len(found["loss"]) == len(found["smoothed"]) == 29
    assert len(stub.stepped) == 30


def test_a_first_loss_that_is_no_number(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: math.nan
    result = training(stub, place, tmp_path / "found", find_lr=True)
    assert result.code == 2
    [said] = result.errors
    assert said.startswith("error: the first loss, from the weights as they are, is nan: ")


@pytest.mark.parametrize(("turn", "refusal"), [(4, True), (5, False)])
def test_a_loss_that_does_not_fall(turn: int, refusal: bool, stub: Stub, place: Path, tmp_path: Path) -> None:
    """Or only over the first four rates, which is too little to tell."""
    stub.loss = lambda step: 3.0 - step if step <= turn else 100.0
    result = training(stub, place, tmp_path / "found", find_lr=True)
    if refusal:
        assert (result.code, result.out) == (2, "")
        assert result.errors == [
            "error: the loss does not fall at any learning rate tried; look at the data and the weights"
        ]
        assert not (tmp_path / "found" / "find-lr.json").exists()
    else:
        assert result.code == 0, result


def test_quiet(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = course
    result = trained(stub, place, tmp_path / "found", find_lr=True, quiet=True)
    assert result.err == ""
    assert result.out.startswith("the loss falls fastest")


def test_what_is_there_stays_as_it_is(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Be it a run, or what --find-lr has found before."""
    trained(stub, place, tmp_path / "run", steps=1)
    stub.loss = course
    trained(stub, place, tmp_path / "found", find_lr=True)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    occupied = training(stub, place, tmp_path / "run", find_lr=True)
    assert occupied.errors == [f"error: {tmp_path}/run holds a run; pass another --out"]
    refused(training(stub, place, tmp_path / "found", find_lr=True, seed=9), "is not empty; pass another --out")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_options_that_it_would_ignore_are_refused(tmp_path: Path) -> None:
    """All at once. Those of a recipe were not given, and what is turned off is off."""

    def given(*words: object) -> Given:
        return parse(parser("train", "numbers"), ["--find-lr", *map(str, words)])

    with pytest.raises(InputError) as raised:
        given("--save-every", 3, "--steps", 7, "--seed", 2, "--eval-limit", 0, "--tensorboard")
    words = "goes without --steps, --eval-limit, --save-every and --tensorboard; leave them out"
    assert str(raised.value) == f"--find-lr does not train, so it {words}"
    with pytest.raises(InputError, match="goes without --lr; leave that out"):
        given("--lr", 0.1)
    found = given("--recipe", "gpt2-124m-10b", "--eval-tasks", "none", "--batch-size", 2)
    assert (found["find_lr"], found["batch_size"]) == (True, 2)


@pytest.mark.parametrize(("changed", "name"), [({}, "finetune"), ({"init": "random", "preset": "tiny"}, "tiny")])
def test_without_a_name_it_is_named_after_its_time(
    changed: dict[str, object], name: str, stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "20261126-143055"))
    stub.loss = course
    values: dict[str, object] = {"init": place / "init", "data": place / "data", "find_lr": True}
    assert trained(stub, tmp_path, None, **values | changed).code == 0
    assert (tmp_path / "runs" / f"find-lr-{name}-20261126-143055" / "find-lr.json").exists()


def test_its_options_are_not_those_of_a_run_that_goes_on(stub: Stub, place: Path, tmp_path: Path) -> None:
    trained(stub, place, tmp_path / "run")
    refused(resume(stub, place, tmp_path / "run", "--find-lr"), "goes without --find-lr; leave that out")
