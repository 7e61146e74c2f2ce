"""Runs that stop and go on, that repeat another, and that find something wrong on the way."""

import errno
import json
import os
import pty
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

import data.cli
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import PRESETS
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import SUMS, write_sums
from data.cli import InputError
from data.runs import accept
from data.runs.run_folder import RunFolder, load_checkpoint, read_sealed, write_sealed
from data.runs.tests.support import (
    SOURCE,
    STEPS,
    TINY,
    TRAIN,
    VALID,
    Folders,
    Stub,
    assert_same_end,
    metrics,
    noisy,
    options,
    place_in,
    resume,
    trained,
    training,
)
from data.testing import call, refused, write_tokens
from data.text import shards

DAMAGED = b"{"
FILES = ("metrics.jsonl", "samples.md", "run.json", "checkpoints/latest")


@pytest.fixture
def stub(stub: Stub) -> Stub:
    return noisy(stub)


def rewind(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after `step` was saved and some more steps were done."""
    shutil.copytree(run, to)
    (to / "checkpoints" / "latest").write_text(f"step-{step}\n")
    for later in (to / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return to


@pytest.mark.parametrize("step", [0, 3, 6, 8])
def test_a_resumed_run_is_the_run_that_went_through(step: int, stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """And shows the same figures: the mean of all losses, the seconds from the beginning."""
    folder, run, through = finished
    stopped = rewind(run, tmp_path / "stopped", step)
    with open(stopped / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 14, "lo')
    result = resume(stub, folder, stopped)
    assert result.code == 0, result
    assert_same_end(stopped, run)
    lines = result.out.splitlines()
    assert lines[0].startswith(f"GPT-2, 0.0M parameters, continuing after step {step}; ")
    assert lines[1] == f"data: data, 500 tokens; 13 steps of 48; run: {stopped}"
    assert lines[2:] == [line.replace("run", str(stopped)) for line in through.out.splitlines()[3:]]
    assert f" {step}/13 [" in result.err.splitlines()[0]
    figures = ", loss 2.625 ("
    assert result.err.split(figures)[1] == through.err.split(figures)[1]
    assert [n for n, _ in stub.validated] == [n for n in (4, 8, 12, 13) if n > step]
    assert [asked[0] for asked in stub.asked] == list(range(step, STEPS))
    (continued,) = read_sealed(stopped / "run.json")["continued"]
    assert continued["step"] == step
    assert continued["command"] == ["python", "-m", "torch_ref.train", "--resume", str(stopped)]
    assert continued["source"] == SOURCE
    assert (continued["device"], continued["versions"]["numpy"]) == ("CPU", np.__version__)


def test_the_bar_of_a_resumed_run_begins_with_the_last_validation(
    stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 4, which is neither the first nor the best."""
    shown: list[str] = []
    monkeypatch.setattr("data.cli.Progress.set_postfix_str", lambda self, text, refresh: shown.append(text))
    assert resume(stub, finished[0], rewind(finished[1], tmp_path / "stopped", 6)).code == 0
    assert [text.split(", ")[1] for text in shown[:3]] == ["val 2.400", "val 2.000", "val 2.000"]


def test_a_resumed_run_records_where_it_did_so(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """Once for every time, beside what it began with."""
    stopped = rewind(finished[1], tmp_path / "stopped", 6)
    stub.kernels, stub.package = "fused", "tinygrad_impl"
    assert resume(stub, finished[0], stopped / "checkpoints" / "step-6").code == 0
    again = resume(stub, finished[0], stopped / "checkpoints" / "step-3")
    assert again.code == 0
    note = f"note: {stopped} was trained to step 13 and goes back to step 3: its later checkpoints (step-6, "
    assert again.err.startswith(note)
    said, began = (read_sealed(run / "run.json") for run in (stopped, finished[1]))
    continued = said.pop("continued")
    assert said == began
    assert [part["step"] for part in continued] == [6, 3]
    assert continued[0]["kernels"] == "fused"
    assert continued[0]["command"][2:4] == ["tinygrad_impl.train", "--resume"]


def test_going_on_from_an_earlier_checkpoint(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """With the newest one damaged, say."""
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    os.truncate(run / "checkpoints" / "step-13" / "model.safetensors", 1000)
    refused(resume(stub, finished[0], run), "the newest good checkpoint of the run is", f"{run}/checkpoints/step-12")
    assert resume(stub, finished[0], run / "checkpoints" / "step-9").code == 0
    assert_same_end(run, finished[1])


@pytest.mark.parametrize("role", ["latest", "best"])
def test_the_files_that_name_a_checkpoint(role: str, stub: Stub, finished: Folders, tmp_path: Path) -> None:
    run = rewind(finished[1], tmp_path / "stopped", 9)
    (run / "checkpoints" / "best").write_text("step-8\n")
    result = resume(stub, finished[0], run / "checkpoints" / role)
    assert result.code == 0, result
    assert f"continuing after step {({'latest': 9, 'best': 8})[role]}; " in result.out
    assert_same_end(run, finished[1])


def test_a_checkpoint_that_was_edited_on_purpose(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """It is refused, until a command has shown what changed in it and accepted that."""
    run = rewind(finished[1], tmp_path / "stopped", 8)
    folder = run / "checkpoints" / "step-8"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"author": "me"}))
    (folder / "NOTES.md").write_text("Mine.")
    with open(folder / SUMS, "a", encoding="utf-8") as f:
        f.write(f"{'0' * 64}  merges.txt\n")
    command = f"`python -m data.runs.accept {folder}`; if not, the newest good checkpoint of the run is "
    refused(resume(stub, finished[0], run), f"{folder}/config.json differs from what was written", command)

    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 4}))  # of which the weights are not
    refused(call(accept.main, folder, cwd=run), "weights of another size")
    (folder / "config.json").write_text(json.dumps(config | {"author": "me"}))
    optimizer = (folder / "optimizer.safetensors").read_bytes()
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    refused(call(accept.main, folder, cwd=run), "optimizer.safetensors does not fit the model beside it")
    (folder / "optimizer.safetensors").write_bytes(optimizer)

    result = call(accept.main, run, cwd=run)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        *("added: NOTES.md", "changed: config.json", "removed: merges.txt"),
        f"{folder} can be loaded (0.0M parameters). Accepted: SHA256SUMS is made anew.",
    ]
    assert call(accept.main, folder, cwd=run).out == f"{folder} is as it was written.\n"
    assert resume(stub, finished[0], run).code == 0
    assert_same_end(run, finished[1])
    (folder / SUMS).unlink()
    refused(call(accept.main, folder, cwd=run), "step-8 has no SHA256SUMS, so there is nothing to accept")


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "half a checkpoint"])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    left: str, stub: Stub, finished: Folders, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    shutil.rmtree(run / "checkpoints")
    if left == "half a checkpoint":
        (run / "checkpoints" / "step-0.partial").mkdir(parents=True)
    if left == "nothing":
        (run / "metrics.jsonl").unlink()
        (run / "samples.md").unlink()
    result = resume(stub, finished[0], run)
    assert result.code == 0, result
    assert "before training: validation loss 2.800 (150 s with compiling, a sample and a checkpoint)" in result.out
    assert_same_end(run, finished[1])


def test_a_finished_run_is_not_resumed(stub: Stub, finished: Folders) -> None:
    refused(
        resume(stub, finished[0], "run"),
        "run is finished, with all its 13 steps; add --steps N to train it for N in all",
    )


FIXED = [
    *(("--preset", "tiny"), ("--init", "init"), ("--data", "data"), ("--out", "x")),
    *(("--batch-size", 2), ("--seq-len", 9), ("--grad-accum", 1), ("--lr", 0.1), ("--min-lr", 0), ("--warmup", 3)),
    *(("--weight-decay", 0.2), ("--betas", 0.1, 0.2), ("--clip", 9), ("--dtype", "bfloat16"), ("--seed", 3)),
    *(("--eval-every", 2), ("--eval-tokens", 7), ("--sample-every", 2), ("--save-every", 2)),
]


@pytest.mark.parametrize("words", FIXED)
def test_what_is_of_the_run_is_not_changed_in_it(words: tuple[object, ...], stub: Stub, finished: Folders) -> None:
    error = f"error: --resume takes this from the run, so it goes without {words[0]}; leave that out"
    assert resume(stub, finished[0], "run", *words).errors == [error]


def test_what_may_change_from_one_part_of_a_run_to_the_next(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    stopped = rewind(finished[1], tmp_path / "stopped", 6)
    result = resume(stub, finished[0], stopped, "--keep", 1, "--quiet", "--tensorboard", "--device", "CPU")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert {path.name for path in (stopped / "checkpoints").glob("step-*")} == {"step-0", "step-8", "step-13"}
    assert (stopped / "tensorboard").exists()
    assert stub.start.options.device == "CPU"
    options = load_checkpoint(stopped / "checkpoints" / "step-13")[3]["options"]
    assert (options["keep"], options["tensorboard"], options["device"]) == (1, True, "CPU")
    assert_same_end(stopped, finished[1])


def test_what_is_no_run(stub: Stub, finished: Folders) -> None:
    for name in ("init", "nowhere"):
        words = f"{name} holds no run ({name}/run.json is missing); pass the folder of one"
        refused(resume(stub, finished[0], name), words)


# What stops it


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_request_to_stop_saves_first(
    number: signal.Signals,
    code: int,
    stub: Stub,
    finished: Folders,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where these tests run under nohup, it is ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, hangup))
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    between = []

    def asked(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)
            between.append({n: signal.getsignal(n) for n in before})

    stub.during = asked
    result = training(stub, finished[0], tmp_path / "run")
    assert result.code == code
    assert result.err.endswith(
        f"\nstopped after step 5, which is saved; go on with\n  python -m torch_ref.train --resume {tmp_path}/run\n"
    )
    assert capfd.readouterr().err == "\nstopping after this step; once more to stop at once\n"
    assert "Validation loss" not in result.out
    assert ", val 2.400, lr " in result.err  # of step 4
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-5\n"
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")} == {
        "step-0",
        "step-3",
        "step-4",
        "step-5",
    }
    assert (tmp_path / "run" / "loss.png").exists()
    assert between == [before]  # a second one acts at once
    assert {n: signal.getsignal(n) for n in before} == before
    stub.during = lambda step: None
    assert resume(stub, finished[0], tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", finished[1])
    assert not (tmp_path / "run" / "checkpoints" / "step-5").exists()  # neither on schedule nor the best
    assert [part["step"] for part in read_sealed(tmp_path / "run" / "run.json")["continued"]] == [5]


def test_a_terminal_that_goes_away(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Neither that nothing can be written to it any more nor a second SIGHUP, which the shell sends, is in the way."""
    run = tmp_path / "run"

    def waiting(step: int) -> None:
        if step == 5:
            (tmp_path / "reached").touch()
            while signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                sleep(0.001)
            os.kill(os.getpid(), signal.SIGHUP)

    process, terminal = pty.fork()
    if process == 0:
        try:
            signal.alarm(60)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            stub.during = waiting
            os.chdir(place)
            sys.argv = ["train", *map(str, options(out=run))]
            data.cli.run(stub.main)
        except SystemExit as e:
            os._exit(int(str(e.code)))
        finally:
            os._exit(99)
    os.set_blocking(terminal, False)
    said = b""
    while not (tmp_path / "reached").exists():
        with suppress(BlockingIOError):
            said += os.read(terminal, 1 << 16)  # or what it says would fill the terminal, and it would wait
        assert os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, said.decode()
        sleep(0.005)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert (run / "checkpoints" / "latest").read_text() == "step-5\n"


def test_a_stop_before_the_first_step_says_how_to_go_on(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    write = stub.write
    stub.write = interrupt  # type: ignore[assignment, method-assign]
    stopped = training(stub, finished[0], tmp_path / "run")
    assert stopped.code == 130
    assert stopped.err.endswith(
        f"stopped before the first step; go on with\n  python -m torch_ref.train --resume {tmp_path}/run\ninterrupted\n"
    )
    stub.write = write  # type: ignore[method-assign]
    assert resume(stub, finished[0], tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", finished[1])


def test_validation_text_of_one_token_is_refused(stub: Stub, place: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", TRAIN, VALID[:1])
    words = "is a single token, which predicts nothing; give more text"
    refused(training(stub, place, tmp_path / "run", data=tmp_path / "data"), words)
    assert not (tmp_path / "run").exists()


def test_a_hangup_that_is_ignored_stays_so(stub: Stub, place: Path, tmp_path: Path) -> None:
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stub.during = lambda step: os.kill(os.getpid(), signal.SIGHUP)
        trained(stub, place, tmp_path / "run", steps=2)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_in_the_last_step_changes_nothing(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    stub.during = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == STEPS else None
    result = training(stub, finished[0], tmp_path / "run")
    assert result.code == 0
    assert "Validation loss 2.800 -> 2.500" in result.out
    assert_same_end(tmp_path / "run", finished[1])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, as in a terminal: what a shell starts in the background ignores it from the beginning."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_request_stops_at_once(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            until = monotonic() + 10
            while signal.getsignal(signal.SIGINT) != before:  # two at once would be one
                assert monotonic() < until
                sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            sleep(10)  # it interrupts this

    stub.during = twice
    result = training(stub, finished[0], tmp_path / "run")
    assert result.code == 130
    assert result.err.endswith("interrupted\n")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-4\n"
    assert signal.getsignal(signal.SIGINT) == before
    stub.during = lambda step: None
    assert resume(stub, finished[0], tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", finished[1])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["a checkpoint", "metrics"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    where: str, number: int, stub: Stub, finished: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, add, checkpoints = os.replace, RunFolder.add_metrics, tmp_path / "run" / "checkpoints"

    def full(source: Path, target: Path) -> None:
        if Path(target) == checkpoints / "step-6.partial" / "optimizer.safetensors":
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    def cut(self: RunFolder, row: dict[str, Any]) -> None:
        if row["step"] == 6:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write('{"step": 6, "lo')
            raise OSError(number, os.strerror(number))
        add(self, row)

    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(RunFolder, "add_metrics", cut)
        else:
            patch.setattr(os, "replace", full)
        result = training(stub, finished[0], tmp_path / "run")
    assert result.code == 2
    assert result.errors == [
        f"error: {os.strerror(number)}: step 6 could not be saved in {tmp_path}/run; make room and go on from the "
        f"newest checkpoint, which is whole, with `python -m torch_ref.train --resume {tmp_path}/run`"
    ]
    assert (checkpoints / "latest").read_text() == "step-4\n"
    load(tmp_path / "run")
    assert resume(stub, finished[0], tmp_path / "run").code == 0  # once there is space again
    assert_same_end(tmp_path / "run", finished[1])


def test_a_disk_that_is_full_at_once(stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    assert training(stub, place, tmp_path / "run").errors == [
        f"error: No space left on device: step 0 could not be saved in {tmp_path}/run; make room and begin again, in "
        "another --out"
    ]


def test_other_faults_of_a_disk_are_not_taken_for_that(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(RunFolder, "save_checkpoint", broken)
    with pytest.raises(OSError, match="Input/output error"):
        training(stub, place, tmp_path / "run")


@pytest.mark.parametrize("when", ["in the first step", "while the checkpoint waits"])
def test_damage_found_late(when: str, stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In so much data that training began before all of it was read: no trained weights are kept."""
    reached = Event()

    def verify(folder: Path) -> None:
        reached.wait()
        sleep(0.1)
        raise InputError(f"shard {folder} is corrupted")

    def stepping(step: int) -> None:
        reached.set()
        if when == "in the first step":
            for thread in enumerate_threads():
                if isinstance(thread, shards.Verification):
                    thread.join()

    monkeypatch.setattr(shards, "verify_folder", verify)
    stub.during = stepping
    result = training(stub, place, tmp_path / "run", save_every=1)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "is corrupted" in result.errors[0]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["best", "latest", "step-0"]
    assert len(metrics(tmp_path / "run")) in (
        [1] if when == "in the first step" else [2, 3]
    )  # the next checkpoint waits


# What is damaged or changed in a run


def with_options(**changed: object) -> Callable[[Path], None]:
    """A run.json with other options, written as if by the program; a change to None takes one out."""

    def change(run: Path) -> None:
        said = read_sealed(run / "run.json")
        said["options"] = {k: v for k, v in (said["options"] | changed).items() if changed.get(k, 0) is not None}
        write_sealed(run / "run.json", said)

    return change


def with_state(**changed: object) -> Callable[[Path], None]:
    """A trainer.json with other values, written as if by the program; a change to None takes one out."""

    def change(run: Path) -> None:
        folder = run / "checkpoints" / "step-3"
        state = json.loads((folder / "trainer.json").read_bytes()) | changed
        state = {name: value for name, value in state.items() if value is not None}
        (folder / "trainer.json").write_text(json.dumps(state))
        (folder / SUMS).unlink()
        write_sums(folder)

    return change


def with_file(name: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path], None]:
    """A file with other content, or without it."""

    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).unlink()
        if change:
            (run / name).write_bytes(change(content))

    return damage


STEP_3 = "checkpoints/step-3"
OTHER = "the newest good checkpoint of the run is"
NOT_THE_ONE = "run.json is not the one that"
POSITION = {"position": -1, "seed": 11, "seq_len": 8, "split": "train"}


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (with_file("run.json", lambda _: DAMAGED), "run.json is damaged"),
        (with_file("run.json", lambda _: b"{}"), "run.json is damaged"),
        (with_file("run.json", lambda content: content.replace(b"0.02", b"0.03")), "run.json is damaged"),
        (with_file("run.json", None), "holds no run"),
        (with_options(steps=None), "run.json is of another version of this program; give the options themselves"),
        (with_options(spells=3), "another version"),
        (with_options(steps="many"), "--steps"),
        (with_options(lr={}), "--lr"),
        (with_options(lr=0.03), NOT_THE_ONE),
        (with_options(betas=[0.5, 0.6]), NOT_THE_ONE),
        (with_options(data="nowhere.txt"), NOT_THE_ONE),
        (with_state(step="3"), "trainer.json is damaged"),
        (with_state(seconds=None), "trainer.json is damaged"),
        (with_state(options=None), "trainer.json is damaged"),
        (with_state(loader={}), "the saved data position None is no count of windows"),
        (with_state(loader=POSITION), "the saved data position -1 is no count of windows"),
        (with_file(f"{STEP_3}/trainer.json", lambda _: b"{"), "trainer.json is damaged"),
        (with_file(f"{STEP_3}/trainer.json", lambda _: b"{}"), "trainer.json differs from what was written"),
        (with_file(f"{STEP_3}/optimizer.safetensors", lambda content: content[:-100]), OTHER),
        (with_file(f"{STEP_3}/optimizer.safetensors", None), "optimizer.safetensors is missing"),
        (with_file(f"{STEP_3}/model.safetensors", lambda content: content[:50]), OTHER),
        (with_file(f"{STEP_3}/{SUMS}", None), OTHER),
        (with_file("checkpoints/latest", None), OTHER),
        (with_file("checkpoints/latest", lambda _: b"step-9\n"), "does not name a checkpoint"),
        (with_file("metrics.jsonl", lambda _: b"x\n"), "metrics.jsonl"),
        (with_file("metrics.jsonl", lambda _: b""), "metrics.jsonl"),
        (with_file("metrics.jsonl", None), "metrics.jsonl"),
    ],
)
def test_resuming_a_damaged_run(
    damage: Callable[[Path], None], word: str, stub: Stub, finished: Folders, tmp_path: Path
) -> None:
    run = rewind(finished[1], tmp_path / "stopped", 3)
    damage(run)
    refused(resume(stub, finished[0], run), word)
    assert not stub.stepped


def test_a_run_begun_before_there_was_an_option(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """It has the option's default: neither run.json nor trainer.json of an older version says a word of it."""
    run = rewind(finished[1], tmp_path / "stopped", 3)
    with_options(keep=None, weight_decay=None)(run)
    options = json.loads((run / "checkpoints" / "step-3" / "trainer.json").read_bytes())["options"]
    with_state(options={name: value for name, value in options.items() if name not in ("clip", "keep")})(run)
    assert resume(stub, finished[0], run).code == 0
    assert_same_end(run, finished[1])
    assert stub.start.options.weight_decay == 0.1
    again = call(stub.main, "--config", run, "--out", tmp_path / "again", cwd=finished[0])
    assert again.code == 0, again
    with_options(weight_decay=None, clip=0.5)(run)  # its default is not what the checkpoint was trained with
    (run / "checkpoints" / "latest").write_text("step-3\n")
    refused(resume(stub, finished[0], run), NOT_THE_ONE)


def test_a_refused_resume_changes_nothing(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """Data that has changed since, say: what was measured after the checkpoint must still be there."""
    run = rewind(finished[1], tmp_path / "stopped", 3)
    with_state(loader={})(run)
    before = [(run / name).read_bytes() for name in FILES]
    refused(resume(stub, finished[0], run), "the saved data position None")
    assert before == [(run / name).read_bytes() for name in FILES]


def test_other_data_than_the_run_had(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    folder = place_in(tmp_path / "elsewhere")
    shutil.rmtree(folder / "data")
    write_tokens(folder / "data", TRAIN[::-1], VALID)
    run = rewind(finished[1], folder / "run", 3)
    refused(resume(stub, folder, run), "cannot resume: the checksum of the data was")


# --config


@pytest.mark.parametrize("kind", ["nanoGPT", "llm.c"])
def test_token_files_of_others(kind: str, stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """The same tokens train the same weights, also where the run stopped; but others do not go on with it."""
    folder, tokens = place_in(tmp_path / "here"), tmp_path / "here" / "tokens"
    tokens.mkdir()
    for name, part in {"train.bin": TRAIN, "val.bin": VALID}.items():
        header = np.array([20240520, 1, len(part), *[0] * 253], "<i4").tobytes() if kind == "llm.c" else b""
        (tokens / ("x_" * bool(header) + name)).write_bytes(header + part.astype("<u2").tobytes())

    def stops(step: int) -> None:
        if step == 8:
            raise InputError("stopped")

    stub.during = stops
    refused_at_8 = training(stub, folder, "run", data="tokens")
    assert refused_at_8.errors == ["error: stopped"]
    assert "data: tokens, 500 tokens; " in refused_at_8.out
    stub.during = lambda step: None
    (train,) = tokens.glob("*train.bin")
    right = train.read_bytes()
    train.write_bytes(right[:-2] + b"ab")
    refused(resume(stub, folder, "run"), "cannot resume: the checksum of the data was ")
    train.write_bytes(right)
    assert resume(stub, folder, "run").code == 0
    assert metrics(folder / "run") == metrics(finished[1])
    ours, theirs = (load(str(run))[1] for run in (folder / "run", finished[1]))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_a_configuration_repeats_a_run(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    folder, run, _ = finished
    result = call(stub.main, "--config", run / "run.json", "--out", tmp_path / "again", cwd=folder)
    assert result.code == 0, result
    assert_same_end(tmp_path / "again", run)
    assert read_sealed(tmp_path / "again" / "run.json")["options"] == read_sealed(run / "run.json")["options"]


def test_a_configuration_carries_every_option(stub: Stub, place: Path, tmp_path: Path) -> None:
    """At values that are no defaults."""
    values: dict[str, object] = {"weight_decay": 0.3, "clip": 0.7, "dtype": "bfloat16", "device": "CPU", "keep": 2}
    values |= {"tensorboard": True, "quiet": True, "eval_tokens": 0, "steps": 3}
    argv = [*options(out=tmp_path / "run", **values), "--betas", 0.6, 0.7]
    assert call(stub.main, *argv, cwd=place).code == 0
    again = call(stub.main, "--config", tmp_path / "run" / "run.json", "--out", tmp_path / "again", cwd=place)
    assert again.code == 0, again
    assert again.out  # what is of a call is not carried: this one is not quiet
    ours, theirs = (read_sealed(tmp_path / name / "run.json")["options"] for name in ("again", "run"))
    assert ours == theirs
    assert (ours["betas"], ours["tensorboard"], ours["eval_tokens"], ours["keep"]) == ([0.6, 0.7], True, 0, 2)


def test_a_configuration_with_other_options(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    """Which win over those that are there."""
    more = ("--out", tmp_path / "run", "--steps", 2, "--weight-decay", 0)
    result = call(stub.main, "--config", finished[1], *more, cwd=finished[0])  # a run's folder will do
    assert result.code == 0, result
    assert len(metrics(tmp_path / "run")) == 3
    options = read_sealed(tmp_path / "run" / "run.json")["options"]
    assert (options["lr"], options["steps"], options["weight_decay"]) == (0.02, 2, 0.0)


def test_a_configuration_with_another_seed(
    stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is other random weights than those that run.json has the checksum of."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    trained(stub, place, tmp_path / "run", init="random", preset="tiny", steps=2)
    again = ("--config", tmp_path / "run" / "run.json", "--out", tmp_path / "other", "--seed", 5)
    assert call(stub.main, *again, cwd=place).code == 0
    assert read_sealed(tmp_path / "other" / "run.json")["seed"] == 5


def test_a_configuration_of_other_data_or_weights(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    folder = place_in(tmp_path / "elsewhere")
    shutil.rmtree(folder / "data")
    write_tokens(folder / "data", TRAIN, VALID + 1)
    shutil.copy(finished[1] / "run.json", folder)
    argv = ("--config", "run.json", "--out", "run")
    error = "error: data is not the text that run.json was run on; put that back, or give another --data"
    assert call(stub.main, *argv, cwd=folder).errors == [error]
    shutil.copytree(folder / "data", folder / "others")
    assert call(stub.main, *argv, "--data", "others", cwd=folder).code == 0
    for name in ("data", "init", "run"):
        shutil.rmtree(folder / name)
    write_tokens(folder / "data", TRAIN, VALID)
    save(folder / "init", TINY, initial_weights(TINY, 2))
    error = "error: init is not the weights that run.json began with; put those back, or give another --init"
    assert call(stub.main, *argv, cwd=folder).errors == [error]
    shutil.copytree(folder / "init", folder / "mine")
    assert call(stub.main, *argv, "--init", "mine", cwd=folder).code == 0


def test_bad_configurations(stub: Stub, finished: Folders, tmp_path: Path) -> None:
    both = call(stub.main, "--resume", "run", "--config", "run/run.json", cwd=finished[0])
    assert both.errors == ["error: --resume and --config exclude each other; leave one of them out"]
    for name, file in (("nowhere.json", "nowhere.json"), ("data", "data/run.json")):
        refused(call(stub.main, "--config", name, cwd=finished[0]), f"there is no file {file}; pass --config runs/NAME")
    write_sealed(tmp_path / "compare.json", {"models": []})
    (tmp_path / "README.md").write_text("# A run")
    for name in ("compare.json", "README.md"):
        result = call(stub.main, "--config", name, cwd=tmp_path)
        refused(result, f"{name} is not a run's run.json; pass --config runs/NAME/run.json")
    write_sealed(tmp_path / "run.json", {"options": 3})
    refused(call(stub.main, "--config", tmp_path / "run.json", cwd=finished[0]), "of another version")


def test_a_spike_is_told_by_what_came_before_the_stop(stub: Stub, place: Path, tmp_path: Path) -> None:
    stub.loss = lambda step: 2 + 0.1 * (step % 2) + 5 * (step == 40)
    changed = {"steps": 50, "sample_every": 99, "save_every": 30, "eval_every": 99}
    result = trained(stub, place, tmp_path / "run", **changed)
    through = metrics(tmp_path / "run")
    again = resume(stub, place, tmp_path / "run" / "checkpoints" / "step-30")
    assert metrics(tmp_path / "run") == through
    jumps = [[line for line in r.out.splitlines() if "jumped" in line] for r in (result, again)]
    assert jumps[0] == jumps[1] != []
