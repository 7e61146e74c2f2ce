"""Runs that are started at once: each has a folder of its own, or is refused."""

import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

import data.runs.start
from data.checkpoints.checkpoint import load
from data.cli import InputError
from data.files import locked
from data.runs.claim import claimed, claimed_new
from data.runs.run_folder import LOCK, read_sealed
from data.runs.tests.support import SEED, STEPS, Stub, metrics, resume, trained, training
from data.testing import Result, refused
from data.text.prepare import prepared

IN_USE = "is in use by process"
AT = "20261126-143055"


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which all runs start."""
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d-%H%M%S", AT))


def course(step: int) -> float:
    """A loss that `--find-lr` finds a rate for."""
    return 5 - step / 9


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("find_lr", [None, True])
def test_three_runs_of_one_second(
    find_lr: bool | None, stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins while the one before gets its data."""
    words: dict[str, object] = {"init": place / "init", "data": place / "data", "find_lr": find_lr}
    words |= {} if find_lr else {"steps": 2}
    results: list[Result] = []

    def another_starts(source: str, *how: Any) -> Path:
        if len(started) < 3:
            started.append(SEED + len(started))
            results.append(trained(stub, tmp_path, None, **words | {"seed": started[-1]}))
        return prepared(source, *how)

    stub.loss = course
    started: list[int] = [SEED]
    monkeypatch.setattr(data.runs.start, "prepared", another_starts)
    results.append(trained(stub, tmp_path, None, **words))
    name = f"{'find-lr-' if find_lr else ''}finetune-{AT}"
    assert sorted(os.listdir(tmp_path / "runs")) == [name, f"{name}-2", f"{name}-3"]
    for number, result in zip(("-3", "-2", ""), results, strict=True):
        assert re.search(rf"{AT}{number}\b(?!-)", result.out)
    if not find_lr:
        for seed, run in zip(started, sorted((tmp_path / "runs").iterdir()), strict=True):
            assert read_sealed(run / "run.json")["seed"] == seed
            assert len(metrics(run)) == 3
            load(str(run))


@pytest.mark.parametrize("words", [{}, {"find_lr": True}])
def test_one_folder_is_not_given_twice(
    words: dict[str, object], stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused while the first gets its data, and leaves everything to it."""
    stub.loss = course
    results: list[Result] = []

    def another_starts(source: str, *how: Any) -> Path:
        if not results:
            results.append(training(stub, place, tmp_path / "run", **words | {"seed": 99}))
        return prepared(source, *how)

    monkeypatch.setattr(data.runs.start, "prepared", another_starts)
    trained(stub, place, tmp_path / "run", **words)
    refused(results[0], f"{tmp_path / 'run'} {IN_USE} {os.getpid()} on ", "or name another folder")
    assert not (tmp_path / "run" / LOCK).exists()
    if not words:
        assert read_sealed(tmp_path / "run" / "run.json")["seed"] == SEED


def test_a_run_is_trained_by_one_process(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Whether by one that began it or by one that resumed it; and the other's refusal changes nothing."""
    run, results, stops = tmp_path / "run", list[Result](), ["stopped"]

    def another_goes_on(step: int) -> None:
        if step in (4, 10):
            results.append(resume(Stub(), place, run))
            results.append(resume(Stub(), place, run / "checkpoints" / "step-3"))
        if step == 8 and stops:
            raise InputError(stops.pop())

    stub.during = another_goes_on
    assert training(stub, place, run).code == 2
    assert resume(stub, place, run).code == 0
    assert len(results) == 4
    for result in results:
        refused(result, f"{run} {IN_USE}")
    assert [row["step"] for row in metrics(run)] == list(range(STEPS + 1))
    assert [part["step"] for part in read_sealed(run / "run.json")["continued"]] == [6]


@pytest.mark.parametrize("out", [None, "run"])
def test_what_fails_before_it_begins_leaves_no_folder(out: str | None, stub: Stub, place: Path, tmp_path: Path) -> None:
    """Bad data, or what a gate between the data and the loop refuses; but a folder that was there stays."""
    words: dict[str, object] = {"init": place / "init", "data": place / "data"}
    refused(
        training(stub, tmp_path, out, **words | {"seq_len": 32, "batch_size": 100}), "fewer than the 200 of a batch"
    )
    gate = Stub()

    def fails() -> None:
        raise InputError("the gate says no")

    gate.train = fails  # type: ignore[method-assign]
    refused(training(gate, tmp_path, out, **words), "the gate says no")
    assert not os.path.exists(tmp_path / "run")
    assert not out or not os.listdir(tmp_path)
    assert out or not os.listdir(tmp_path / "runs")
    if out:
        (tmp_path / out).mkdir()
        refused(training(stub, tmp_path, out, **words | {"seq_len": 32, "batch_size": 100}), "fewer than")
        assert os.listdir(tmp_path / out) == []
        trained(stub, tmp_path, out, **words | {"steps": 1})


def test_a_killed_run_hinders_none(stub: Stub, place: Path, tmp_path: Path) -> None:
    """At its very beginning it leaves the lock, which nobody has; later, a run that goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("process 1 on a machine that is gone\n")
    trained(stub, place, tmp_path / "run", steps=6)
    (tmp_path / "run" / LOCK).write_text("process 1 on a machine that is gone\n")
    refused(resume(stub, place, tmp_path / "run"), "is finished")


def test_a_folder_that_its_maker_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maker's run fails between our seeing its folder and our locking it: we make it ourselves."""
    folder, tries = tmp_path / "run", []
    folder.mkdir()

    def locked_late(file: Path) -> Any:
        tries.append(file)
        if len(tries) == 1:
            folder.rmdir()
        return locked(file)

    monkeypatch.setattr("data.runs.claim.locked", locked_late)
    with claimed(folder, empty=True):
        assert os.listdir(folder) == [LOCK]
    assert not folder.exists()
    assert len(tries) == 2


def test_a_run_that_came_and_went_before_the_lock_was_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked_late(file: Path) -> Any:
        (tmp_path / "run" / "run.json").write_text("{}")
        return locked(file)

    monkeypatch.setattr("data.runs.claim.locked", locked_late)
    with pytest.raises(InputError, match=r"holds a run; pass `--resume"), claimed(tmp_path / "run", empty=True):
        pass
    assert os.listdir(tmp_path / "run") == ["run.json"]


@pytest.mark.parametrize("empty", [True, False])
def test_what_cannot_be_a_folder(empty: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match=rf"{name} is"), claimed(tmp_path / name, empty=empty):
            pass
    with claimed_new(tmp_path / "file") as made:
        assert made == tmp_path / "file-2"


def start_at_once(barrier: Any, stub: Stub, place: Path, seed: int, out: str | None) -> None:
    """In a process of its own."""
    barrier.wait()
    result = training(stub, place, out, seed=seed, steps=2)
    (place / f"{seed}.txt").write_text(f"{result.code} {result.err}")


@pytest.mark.slow
@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("out", [None, "run"])
def test_three_processes_at_once_ten_times_over(out: str | None, stub: Stub, place: Path, tmp_path: Path) -> None:
    """Without a name each has a folder of its own; of those with one name, one has it."""
    fork = multiprocessing.get_context("fork")
    for turn in range(10):
        folder = tmp_path / str(turn)
        folder.mkdir()
        for name in ("init", "data"):
            (folder / name).symlink_to(place / name)
        barrier = fork.Barrier(3)
        processes = [fork.Process(target=start_at_once, args=(barrier, stub, folder, seed, out)) for seed in (1, 2, 3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        said = {seed: (folder / f"{seed}.txt").read_text() for seed in (1, 2, 3)}
        runs = [folder / "run"] if out else sorted((folder / "runs").iterdir())
        trained_by = [read_sealed(run / "run.json")["seed"] for run in runs]
        assert sorted(trained_by) == [seed for seed, words in said.items() if words[0] == "0"], said
        assert len(runs) == (1 if out else 3)
        for run in runs:
            assert len(metrics(run)) == 3
            assert load(str(run))
        for seed in {1, 2, 3} - set(trained_by):
            assert re.fullmatch(r"2 error: run (is in use by|holds a run;).*\n", said[seed]), said
    assert time.strftime("%Y%m%d-%H%M%S") == AT
