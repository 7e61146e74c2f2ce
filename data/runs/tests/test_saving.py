"""What a thread saves while training goes on. The tests hold it up where they need to, by an event."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import data.cli
import data.runs.recorder
from data.checkpoints.checkpoint import latest_checkpoint
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import checkpoints, damage
from data.cli import InputError
from data.ranks import Ranks
from data.runs import run_folder, saving
from data.runs.implementation import Implementation
from data.runs.options import Options
from data.runs.recorder import Recorder
from data.runs.run_folder import RunFolder, load_checkpoint
from data.runs.saving import Saver
from data.runs.tests.support import (
    TINY,
    Folders,
    Stub,
    StubTrainer,
    assert_same_end,
    metrics,
    noisy,
    options,
    resume,
    trained,
    training,
    wait_for_saving,
)
from data.tests.ranks import in_ranks
from data.text import shards

PATIENCE = 60.0  # seconds after which a test that waits for another thread has failed


@pytest.fixture
def stub(stub: Stub) -> Stub:
    return noisy(stub)


class Held:
    """Holds up the thread that saves step 3, before it does anything, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.free, self.writing = Event(), Event(), Event()
        self.saved = list[int]()
        self.fault: Exception | None = None  # of the disk
        begun, run, save = list[Saver](), Saver._run, RunFolder.save_checkpoint

        def held(saver: Saver, to_do: Callable[[], None]) -> None:
            begun.append(saver)
            if len(begun) == 2:  # after step 0
                self.reached.set()
                assert self.free.wait(PATIENCE)
            run(saver, to_do)

        def saved(folder: RunFolder, *given: Any) -> Path:
            step = given[3]["step"]
            if step == 3:
                self.writing.set()
                if self.fault:
                    raise self.fault
            path = save(folder, *given)
            self.saved.append(step)
            return path

        monkeypatch.setattr(Saver, "_run", held)
        monkeypatch.setattr(RunFolder, "save_checkpoint", saved)

    def until_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets it go as soon as training waits for it, however short."""
        say = Recorder._say_what_is_awaited

        def said(recorder: Recorder) -> None:
            say(recorder)
            self.free.set()

        monkeypatch.setattr(saving, "PATIENCE", 0.0)
        monkeypatch.setattr(Recorder, "_say_what_is_awaited", said)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


def test_a_checkpoint_is_of_its_moment(
    held: Held, stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another step is trained and their metrics written before anything of step 3 is."""
    run, drawn = tmp_path / "run", list[int]()
    monkeypatch.setattr(
        data.runs.recorder, "plot_losses", lambda path, title, metrics: drawn.append(metrics[-1]["step"])
    )

    def further(step: int) -> None:
        if step == 4:
            assert held.reached.wait(PATIENCE)
        if step == 5:
            assert (run / "checkpoints" / "latest").read_text() == "step-0\n"
            assert len(metrics(run)) == 5
            held.free.set()

    stub.during = further
    trained(stub, finished[0], run, eval_every=5)  # so that none is saved before step 5
    assert drawn == [3, 5, 6, 9, 10, 12, 13]
    expected = load_checkpoint(finished[1] / "checkpoints" / "step-3")
    found = load_checkpoint(run / "checkpoints" / "step-3")
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    for name in ("step", "tokens", "seconds", "loader"):
        assert found[3][name] == expected[3][name]
    RunFolder.resume(run, found[3], {})  # its lines of metrics.jsonl are vouched for, and no more


def test_one_is_saved_at_a_time(stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are the arrays of the next in memory before it is."""
    course, copies, save = list[str](), StubTrainer.copies, Recorder._save

    def copied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        course.append("copied")
        return copies(arrays)

    def saved(recorder: Recorder, *given: Any) -> None:
        Event().wait(0.01)
        save(recorder, *given)
        course.append("saved")

    monkeypatch.setattr(StubTrainer, "copies", staticmethod(copied))
    monkeypatch.setattr(Recorder, "_save", saved)
    trained(stub, finished[0], tmp_path / "run", steps=4, save_every=1)
    assert course == ["copied", "copied", "saved"] * 5
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 5


def test_a_fault_ends_training_at_the_next_step(held: Held, stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """The step that is named is the one that could not be saved, not the one that training had come to."""
    run = tmp_path / "run"
    held.fault = OSError(errno.ENOSPC, "No space left on device")

    def meanwhile(step: int) -> None:
        if step == 5:
            held.free.set()
            wait_for_saving()

    stub.during = meanwhile
    result = training(stub, finished[0], run, eval_every=99)
    assert (result.code, len(stub.stepped)) == (2, 5)
    assert result.errors == [
        f"error: No space left on device: step 3 could not be saved in {run}; make room and go on from the newest "
        f"checkpoint, which is whole, with `python -m torch_ref.train --resume {run}`"
    ]
    assert (run / "checkpoints" / "latest").read_text() == "step-0\n"


def interrupt(step: int) -> None:
    if step == 5:
        raise KeyboardInterrupt


def broken(step: int) -> None:
    if step == 5:
        raise InputError("this broke")


def terminated(step: int) -> None:
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("during", "steps", "code", "latest"),
    [(None, 4, 0, 4), (None, 5, 0, 5), (terminated, 9, 143, 5), (interrupt, 9, 130, 3), (broken, 9, 2, 3)],
)
def test_every_way_out_waits(
    during: Callable[[int], None] | None,
    steps: int,
    code: int,
    latest: int,
    held: Held,
    stub: Stub,
    finished: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end, a request to stop, and what ends training at once; and says what it waits for."""
    held.until_waited_for(monkeypatch)
    stub.during = during or stub.during
    result = training(stub, finished[0], tmp_path / "run", steps=steps, eval_every=99)
    assert result.code == code, result
    assert result.err.count("waiting until step 3 is saved\n") == 1
    assert latest_checkpoint(tmp_path / "run").name == f"step-{latest}"
    assert held.saved == [0, 3, latest][: 2 + (latest > 3)]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_the_checkpoint_that_an_error_names_is_there(
    held: Held, stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the newest, which was being written."""
    held.until_waited_for(monkeypatch)
    stub.loss = lambda step: np.nan if step == 5 else 3.0
    result = training(stub, finished[0], tmp_path / "run", eval_every=99)
    assert f"and {tmp_path}/run/checkpoints/step-3 has those before; look at the data" in result.errors[0]


def test_what_could_not_be_saved_is_told_on_the_way_out(
    held: Held, stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when training was asked to stop at once: it is not where it was left."""
    held.until_waited_for(monkeypatch)
    held.fault = OSError(errno.ENOSPC, "No space left on device")
    stub.during = interrupt
    result = training(stub, finished[0], tmp_path / "run", eval_every=99)
    assert result.code == 2
    assert "step 3 could not be saved" in result.errors[0]


def test_nothing_is_named_before_all_tokens_are_verified(
    held: Held, stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the thread that waits for that: training goes on."""
    verified, early = Event(), list[bool]()
    held.free.set()
    monkeypatch.setattr(shards, "verify_folder", lambda folder: verified.wait(PATIENCE))

    def look(step: int) -> None:
        if step == 6:
            early.append(held.writing.wait(0.2))
            verified.set()

    stub.during = look
    trained(stub, finished[0], tmp_path / "run", eval_every=99)
    assert early == [False]
    assert latest_checkpoint(tmp_path / "run").name == "step-13"


def test_a_kill_in_the_middle_of_a_save(
    stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `latest` named before is there, and the run that goes on is the one that was left alone."""
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        try:
            half, write_sums = Event(), run_folder.write_sums

            def stuck(folder: Path, known: Mapping[str, str]) -> None:
                if folder.name == "step-6.partial":
                    half.set()
                    Event().wait()
                write_sums(folder, known)

            def kill(step: int) -> None:
                if step == 8 and half.wait(PATIENCE):
                    os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(run_folder, "write_sums", stuck)
            stub.during = kill
            sys.argv = ["train", *map(str, options(out=run))]
            os.chdir(finished[0])
            data.cli.run(stub.main)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (run / "checkpoints" / "step-6.partial" / "model.safetensors").exists()
    assert latest_checkpoint(run).name == "step-4"
    assert not any(damage(path) for path in checkpoints(run / "checkpoints"))
    assert len(metrics(run)) == 8
    assert resume(stub, finished[0], run).code == 0
    assert_same_end(run, finished[1])


# Ranks


class Spread:
    """A trainer of which every rank has a part: none has the whole unless all of them ask for it."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.steps = ranks, 0

    def arrays(self, keep: bool) -> dict[str, np.ndarray]:
        whole = np.float32(sum(self.ranks.gather((self.ranks.rank + 1) * self.steps)))
        return {name: array + whole for name, array in initial_weights(TINY, 1).items()} if keep else {}

    def moments(self, keep: bool) -> dict[str, np.ndarray]:
        return {f"{m}.{n}": a for m in ("exp_avg", "exp_avg_sq") for n, a in self.arrays(keep).items()}


def recorder_of(ranks: Ranks, out: Path, resumed: bool, check: Callable[[], None]) -> Recorder:
    """Of a run in `out`, which may be another for each rank; of one that is resumed from step 3."""
    trainer: Any = Spread(ranks)
    by = Implementation(
        package="torch_ref",
        trainer=trainer,
        arrays=trainer.arrays,
        moments=trainer.moments,
        learning_rate=lambda *_: 0.1,
        evaluate=lambda _: (1.0, 1),
        continue_text=lambda prompt, *_: f"{prompt} there was rank {ranks.rank}",
        device="CPU",
        device_name="abacus",
    )
    values: dict[str, Any] = {"init": "init", "data": "data", "steps": 9, "batch_size": 3, "seq_len": 8, "lr": 0.02}
    values |= {"min_lr": 0.0, "warmup": 0, "betas": (0.9, 0.95), "dtype": "float32", "eval_every": 4, "eval_tokens": 0}
    values |= {"sample_every": 4, "save_every": 3, "tensorboard": True, "out": out, "resume": out if resumed else None}
    state: dict[str, Any] = {"step": 0}
    if resumed and ranks.rank == 0:
        state = load_checkpoint(out / "checkpoints" / "step-3")[3]
    start: Any = SimpleNamespace(
        config=TINY,
        options=Options(**values),
        ranks=ranks,
        state=ranks.broadcast(state),
        moments={"exp_avg.": np.zeros(0)} if resumed else None,
        changed={},
        loader=SimpleNamespace(state=lambda: {"position": 6 * trainer.steps}),
        verification=SimpleNamespace(check=lambda timeout=0: check()),
        tokenizer=None,
        described=lambda: {"seed": 11},
        machines={},
    )
    return Recorder(start, by, {"parity.json": {"verdict": "equal"}})


def on_a_rank(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Steps 0 to 3 with a checkpoint of the last, on to 4, and then what does not go well."""
    data.runs.recorder.plot_losses = lambda *_: None  # it would take most of the time, and this process is this test's
    out, found = folder / f"run-{ranks.rank}", dict[str, Any]()
    begun = recorder_of(ranks, out, False, lambda: None)
    trainer: Any = begun.by.trainer
    for trainer.steps in range(4):
        begun.metrics({"step": trainer.steps, "val_loss": 3.0})
    begun.sample()
    begun.checkpoint(0, 0.0)
    with begun.finished():
        pass
    begun.metrics({"step": 4, "val_loss": 3.0})
    begun.close()
    assert [row["step"] for row in begun.folder.metrics] == [0, 1, 2, 3, 4]

    wrong: Callable[[], None] | None = None
    gone_on = recorder_of(ranks, out, True, lambda: wrong() if wrong else None)
    found["known"] = [row["step"] for row in gone_on.folder.metrics], gone_on.folder.samples
    trainer = gone_on.by.trainer
    trainer.steps = 4
    gone_on.metrics({"step": 4, "val_loss": 3.0})
    wrong = corrupted if ranks.rank == 1 else None
    found["damage on the other"] = outcome(lambda: gone_on.checkpoint(0, 0.0))
    wrong = None
    gone_on.folder.save_checkpoint = full  # type: ignore[method-assign, assignment]

    def leave() -> None:
        with gone_on.finished():
            pass

    def at_the_next_step() -> None:
        wait_for_saving()
        if ranks.numbers(gone_on.failed).any():
            gone_on.wait()

    for moment, ends in {
        "step": at_the_next_step,
        "checkpoint": lambda: gone_on.checkpoint(0, 0.0),
        "end": leave,
    }.items():
        gone_on.checkpoint(0, 0.0)
        found[moment] = outcome(ends)
    gone_on.close()
    wrong = None
    found["occupied"] = outcome(lambda: recorder_of(ranks, out, False, lambda: None))
    return found


def corrupted() -> None:
    raise InputError("these tokens are corrupted")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def outcome(do: Callable[[], object]) -> str:
    try:
        do()
    except InputError as e:
        return str(e)
    return "nothing"


def test_the_first_rank_alone_writes(tmp_path: Path) -> None:
    """The other has a folder that is not there; it knows what it has to, and ends when the first one does."""
    first, other = in_ranks(2, on_a_rank, tmp_path)
    run = tmp_path / "run-0"
    assert os.listdir(tmp_path) == ["run-0"]
    assert first["known"] == other["known"] == ([0, 1, 2, 3], [(3, "Once upon a time there was rank 0")])
    assert first == other  # launch says it once
    assert first["damage on the other"].startswith("rank 1 on ")
    assert first["damage on the other"].endswith(": these tokens are corrupted")
    assert first["occupied"].startswith(f"{run} holds a run; pass `--resume")
    for moment in ("step", "checkpoint", "end"):
        sentence = f"No space left on device: step 4 could not be saved in {run}; make room and go on from the newest"
        assert sentence in first[moment]
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-3"]
    _, arrays, moments, state = load_checkpoint(latest_checkpoint(run))
    for name, array in initial_weights(TINY, 1).items():
        np.testing.assert_array_equal(arrays[name], array + np.float32(3 * (1 + 2)))
        np.testing.assert_array_equal(moments[f"exp_avg.{name}"], arrays[name])
    assert (state["step"], state["loader"]) == (3, {"position": 18})
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3, 4]
    assert (run / "samples.md").read_text(encoding="utf-8").count("## Step") == 1
