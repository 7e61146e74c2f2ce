"""Training on several ranks that exchange through gloo: what one process would do, and what ends them all at once."""

import errno
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import data.ranks
import data.runs.recorder
import data.runs.sameness
import data.runs.start
import data.text.shards
from data.cli import InputError
from data.ranks import ALONE, Ranks
from data.runs.implementation import Batch
from data.runs.run_folder import load_checkpoint, read_sealed
from data.runs.tests.conftest import NameOnly
from data.runs.tests.support import SOURCE, Stub, StubTrainer, T, metrics, options, windows_of_step
from data.testing import Result, call
from data.tests.ranks import in_ranks

RUN: dict[str, object] = {"steps": 6, "batch_size": 3, "grad_accum": 4, "sample_every": 3}  # 12 windows an update


class RankStub(Stub):
    """The program with losses that its batches decide; `ranks` exchange them as an implementation has to."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks, self.signals = ranks, dict[int, int]()
        self.own_loss: Callable[[int, Sequence[Batch]], float] = lambda step, batches: mean(batches)

    def trainer(self, arrays: Mapping[str, np.ndarray]) -> StubTrainer:
        return RankTrainer(self, arrays)

    def evaluate(self, step: int, batches: Iterable[Batch]) -> tuple[float, int]:
        seen = list(batches)
        self.validated.append((step, seen))
        targets = np.concatenate([y[y >= 0] for _, y in seen]) if seen else np.zeros(0)
        return float(np.sqrt(targets).sum() / (1 + step)), len(targets)


class RankTrainer(StubTrainer):
    """Averages the ranks' losses; what is shown to all of them is in the weights."""

    stub: RankStub

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        own = self.stub.own_loss(self.steps + 1, batches)
        loss, seen = self.stub.ranks.numbers(own, mean(batches)).mean(axis=0).tolist()
        self.stub.loss = lambda step: loss
        found = super().step([(np.full((1, 1), seen), batches[0][1])], lr)
        self.stub.stepped[-1] = list(batches), lr
        return found

    def finite(self, batches: Sequence[Batch]) -> bool:
        return bool(np.isfinite(self.stub.own_loss(self.steps + 1, batches)))


def mean(batches: Sequence[Batch]) -> float:
    return float(np.mean([x for x, _ in batches]))


def changed(run: Mapping[str, object]) -> list[object]:
    return options(**{**RUN, **run})


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a command."""

    result: Result
    stepped: list[list[Batch]]  # the micro-batches of each step
    validated: list[tuple[int, list[Batch]]]
    sampled: list[int]

    @property
    def windows(self) -> list[list[int]]:
        """Which windows of the training data each step had, by their first token."""
        return [[(int(x[0]) - 1000) // T for batch, _ in step for x in batch] for step in self.stepped]


Prepare = Callable[[RankStub, pytest.MonkeyPatch], None]


def command(ranks: Ranks, folder: Path, words: Sequence[object], prepare: Prepare = lambda stub, patch: None) -> Seen:
    """What a rank sees of a command."""
    stub = RankStub(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.runs.start, "of_folder", lambda folder, vocab_size: NameOnly({}))
        patch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"a picture"))
        patch.setattr(data.runs.recorder, "revision", lambda: SOURCE)
        patch.setattr(data.ranks, "TURN", 0.0)  # errors are told at once
        prepare(stub, patch)
        result = call(stub.main, *words, cwd=folder)
    sampled = [step for step, *_ in stub.sampled]
    return Seen(result, [batches for batches, _ in stub.stepped], stub.validated, sampled)


# What happens on rank 1 alone


def stopped(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    """It is told twice to stop, as by the terminal and by torchrun."""

    def during(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    stub.during = during


def not_finite(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    stub.own_loss = lambda step, batches: np.nan if step == 2 else 1.0


def without_data(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Path:
        raise InputError("there is no such text")

    patch.setattr(data.runs.start, "prepared", missing)


def without_disk(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", "text")

    patch.setattr(data.runs.start, "prepared", missing)


def damaged(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    """Found while the first step is computed."""
    reached = Event()

    def verify(folder: Path) -> None:
        reached.wait()
        raise InputError("a shard is corrupted")

    def during(step: int) -> None:
        reached.set()
        for thread in enumerate_threads():
            if isinstance(thread, data.text.shards.Verification):
                thread.join()

    patch.setattr(data.text.shards, "verify_folder", verify)
    stub.during = during


def other_weights(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    real = data.runs.start.complete

    def complete(*args: Any) -> Any:
        found, config, arrays = real(*args)
        return found, config, arrays | {"ln_f.bias": arrays["ln_f.bias"] + 1}

    patch.setattr(data.runs.start, "complete", complete)


def other_seed_within(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    real: Any = data.runs.start.Loader
    patch.setattr(data.runs.start, "Loader", lambda *args: real(*(*args[:4], args[4] + 1, *args[5:])))


def other_versions(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(data.runs.sameness, "versions", lambda: {"the version of torch": "1.0"})


def other_source(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(data.runs.sameness, "source_digest", lambda: "0123")


HOST = r"rank 1 on \S+"


def differ(what: str, more: str) -> str:
    return rf"the ranks differ in {what} \(rank 0 on \S+: {more}"


REFUSED: dict[str, tuple[Prepare | None, list[object], str]] = {
    "without data": (without_data, [], f"{HOST}: there is no such text"),
    "without disk": (without_disk, [], f"{HOST}: Permission denied at text; mend the permissions, or name another .*"),
    "weights": (other_weights, [], differ("their weights", ".*; copy the same files to all hosts.*")),
    "seed within": (other_seed_within, [], differ("their place in the data", ".*; copy the same .*")),
    "seed": (
        None,
        ["--seed", 12],
        differ("--seed", r"11; rank 1 on \S+: 12\); give all ranks the same options"),
    ),
    "versions": (other_versions, [], differ("the version of .*", ".*; install the same versions on all hosts")),
    "source": (other_source, [], differ("the source code", ".*: 0123.*; copy the same files .*")),
}


def everything(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All commands of these tests, on each of two ranks."""
    only = ranks.rank == 1
    found: dict[str, Any] = {}

    def run(name: str, words: Sequence[object], prepare: Prepare | None = None) -> None:
        found[name] = command(ranks, folder, words, prepare or (lambda stub, patch: None))

    run("run", changed({"out": "run"}))
    run("new", changed({"steps": 1}))
    run("one batch", changed({"out": "one-batch", "steps": 1, "eval_tokens": 10}))
    run("stopped", [*changed({"out": "stopped"}), "--resume-if-any"], stopped if only else None)
    found["step"] = os.listdir(folder / "stopped" / "checkpoints")
    ranks.barrier()
    run("gone on", [*changed({"out": "stopped"}), "--resume-if-any"])
    run("finished", [*changed({"out": "stopped"}), "--resume-if-any"])
    run("not finite", changed({"out": "not-finite"}), not_finite if only else None)
    run("damaged", changed({"out": "damaged"}), None if only else damaged)
    run("uneven", changed({"out": "uneven", "grad_accum": 3}))
    run("find-lr", options(out="find", find_lr=True, batch_size=3, grad_accum=4), falling)
    for name, (prepare, more, _) in REFUSED.items():
        run(name, [*changed({"out": name}), *(more if only else [])], prepare if only else None)
    return found


def falling(stub: RankStub, patch: pytest.MonkeyPatch) -> None:
    stub.own_loss = lambda step, batches: abs(step - 30.0) + 1


@pytest.fixture(scope="module")
def seen(place: Path) -> list[dict[str, Any]]:
    found = in_ranks(2, everything, place)
    alone = command(ALONE, place, changed({"out": "alone"}))
    assert alone.result.code == 0, alone
    return [
        *found,
        {"run": alone, "one batch": command(ALONE, place, changed({"out": "a", "steps": 1, "eval_tokens": 10}))},
    ]


def test_ranks_share_what_one_process_would_read(seen: list[dict[str, Any]]) -> None:
    one, other, alone = (found["run"] for found in seen)
    assert one.result.code == other.result.code == 0, (one.result, other.result)
    assert [first + second for first, second in zip(one.windows, other.windows, strict=True)] == alone.windows
    assert alone.windows[0] == [*windows_of_step(1), *windows_of_step(2)]
    assert all(len(windows) == 6 for windows in one.windows)
    assert [x.shape for x, _ in one.stepped[0]] == [(3, T)] * 2


def test_the_files_are_those_of_one_process(seen: list[dict[str, Any]], place: Path) -> None:
    ours, theirs = metrics(place / "run"), metrics(place / "alone")
    assert len(ours) == len(theirs) == 7
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"seconds", "tokens_per_second"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-12)
    assert (place / "run" / "samples.md").read_text() == (place / "alone" / "samples.md").read_text()
    (_, ours_w, ours_m, state), (_, w, m, _) = (
        load_checkpoint(place / r / "checkpoints/step-6") for r in ("run", "alone")
    )
    for name in w:
        np.testing.assert_allclose(ours_w[name], w[name], rtol=1e-6)
    assert ours_m.keys() == m.keys()
    assert state["loader"]["position"] == 72


def test_validation_is_shared_out(seen: list[dict[str, Any]], place: Path) -> None:
    one, other, alone = (found["run"].validated for found in seen)
    for (_, ours), (_, theirs), (_, whole) in zip(one, other, alone, strict=True):
        assert (len(ours), len(theirs), len(whole)) == (1, 1, 2)
        np.testing.assert_array_equal([y for _, y in [*ours, *theirs]], [y for _, y in whole])
    few = [found["one batch"].validated for found in seen]
    assert [[len(batches) for _, batches in ranks] for ranks in few] == [[1, 1], [0, 0], [1, 1]]
    assert metrics(place / "one-batch")[0]["val_loss"] == metrics(place / "a")[0]["val_loss"]


def test_rank_0_alone_speaks_and_samples(seen: list[dict[str, Any]]) -> None:
    one, other, _ = (found["run"] for found in seen)
    assert (other.result.out, other.result.err, other.sampled) == ("", "", [])
    assert one.sampled == [0, 3, 6]
    said = "2 ranks on 1 host: 2 x abacus of 9 beads; global batch: 12 windows, 96 tokens, 6 a rank in 2 micro-batches"
    said += " of 3"
    assert said in one.result.out.splitlines()
    assert seen[2]["run"].result.out.count("global batch") == 0


def test_run_json_tells_of_ranks(seen: list[dict[str, Any]], place: Path) -> None:
    said, alone = (read_sealed(place / run / "run.json") for run in ("run", "alone"))
    hosts = said["ranks"].pop("hosts")
    assert list(hosts.values()) == [2]
    cards = {"abacus of 9 beads": 2}
    assert said.pop("ranks") == {"world_size": 2, "cards": cards, "global_batch": 12, "global_batch_tokens": 96}
    assert said["options"] == alone["options"] | {"zero": 1, "reduce_dtype": "float32"}
    assert said.keys() == alone.keys()
    assert read_sealed(place / "stopped" / "run.json")["continued"][0]["ranks"]["world_size"] == 2


def test_rank_0_names_a_new_run(seen: list[dict[str, Any]], place: Path) -> None:
    runs = [path for path in (place / "runs").iterdir() if path.name.startswith("finetune-")]
    assert len(runs) == 1
    assert f"run: runs/{runs[0].name}" in seen[0]["new"].result.out


def test_all_stop_after_the_same_step_and_go_on(seen: list[dict[str, Any]], place: Path) -> None:
    """Rank 1 alone is told, twice within a moment, which is no second request."""
    one, other, _ = seen
    for found in (one, other):
        assert found["stopped"].result.code == 128 + signal.SIGTERM
        assert len(found["stopped"].stepped) == 3
        assert "step-3" in found["step"]
        assert "step-4" not in found["step"]
        assert found["gone on"].result.code == 0, found["gone on"].result
        assert found["stopped"].windows + found["gone on"].windows == found["run"].windows
    assert one["stopped"].result.err.count("stopped after step 3, which is saved; go on with") == 1
    assert other["stopped"].result.err == ""
    for row, expected in zip(metrics(place / "stopped"), metrics(place / "run"), strict=True):
        assert {name: row[name] for name in row if "second" not in name} == {
            name: expected[name] for name in expected if "second" not in name
        }


def test_a_finished_run_is_no_error_for_what_goes_on_by_itself(seen: list[dict[str, Any]]) -> None:
    one, other = (found["finished"] for found in seen[:2])
    assert one.result.code == other.result.code == 0
    assert one.result.out == "stopped is finished, with all its 6 steps\n"
    assert other.result.out == ""


def test_the_rank_that_is_not_finite_is_named(seen: list[dict[str, Any]]) -> None:
    for found in seen[:2]:
        result = found["not finite"].result
        assert result.code == 2
        assert "the loss is nan" in result.errors[0]
        assert "at step 2, on windows 18 to 23 (rank 1) of the data; the weights were left" in result.errors[0]


def test_damaged_data_ends_all(seen: list[dict[str, Any]]) -> None:
    for found in seen[:2]:
        assert found["damaged"].result.code == 2
        assert len(found["damaged"].stepped) == 1
        assert re.search(r"error: (rank 0 on \S+: )?a shard is corrupted$", found["damaged"].result.errors[0])


def test_ranks_that_cannot_share_equally(seen: list[dict[str, Any]]) -> None:
    said = "error: 2 ranks cannot share equally the 9 windows of an update (--grad-accum 3 x --batch-size 3, over all "
    for found in seen[:2]:
        assert found["uneven"].result.errors == [said + "ranks); start 1 or 3 ranks, or give --grad-accum 4"]


def test_the_learning_rate_finder(seen: list[dict[str, Any]], place: Path) -> None:
    one, other = (found["find-lr"] for found in seen[:2])
    assert one.result.code == other.result.code == 0, one
    assert "the loss falls fastest at" in one.result.out
    assert other.result.out == ""
    assert (place / "find" / "find-lr.json").is_file()


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_has_ends_all(name: str, seen: list[dict[str, Any]], place: Path) -> None:
    for found in seen[:2]:
        result = found[name].result
        assert result.code == 2, result
        assert re.fullmatch(f"error: {REFUSED[name][2]}", result.errors[0]), result.errors
        assert not found[name].stepped
    assert not (place / name).exists()
