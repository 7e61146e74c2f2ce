"""Training longer than was asked at first, and the learning rates of a run in several spans."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.checkpoint import checkpoints
from data.cli import InputError
from data.runs.options import Options, parse, parser
from data.runs.run_folder import load_checkpoint, read_sealed, write_sealed
from data.runs.schedule import rate, trained_longer
from data.runs.start import complete
from data.runs.tests.support import SEED, STEPS, Stub, metrics, options, resume, trained
from data.testing import call, refused
from data.text.sampling import SAMPLING


def cosine(step: int, steps: int, peak: float, minimum: float, warmup: int) -> float:
    """As the implementations have it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def of_a_run(*argv: object) -> Options:
    words = ["--preset", "tiny", "--lr", "1", "--min-lr", "0.1", "--warmup", "10", *map(str, argv)]
    return complete(parse(parser("train", "numbers"), words), "CPU")[0]


def rates(options: Options) -> list[float]:
    return [rate(options, step, cosine) for step in range(options.steps)]


def longer(options: Options, steps: int, step: int, rewarm: bool = False) -> Options:
    return trained_longer(replace(options, steps=steps, rewarm=rewarm), vars(options), step)


def test_the_rate_stays_at_the_lowest_past_the_end_of_its_cosine() -> None:
    run = of_a_run("--steps", 100)
    more = rates(longer(run, 150, 100))
    assert more[:100] == rates(run) == [cosine(step, 100, 1, 0.1, 10) for step in range(100)]
    assert more[100:] == [0.1] * 50
    assert rates(longer(run, 60, 20)) == rates(run)[:60]  # less long: cut off
    assert rates(longer(longer(run, 150, 100), 170, 150)) == [*more, *[0.1] * 20]


def test_the_rate_rises_again_from_where_it_is() -> None:
    run = of_a_run("--steps", 100)
    more = rates(longer(run, 200, 100, rewarm=True))
    assert more[:100] == rates(run)
    np.testing.assert_allclose(more[100:110], 0.1 + 0.9 * np.arange(1, 11) / 10, rtol=1e-12)
    np.testing.assert_allclose(more[110:], rates(run)[10:], rtol=1e-12)
    early = rates(longer(run, 200, 40, rewarm=True))  # before it had fallen
    fallen = rates(run)[40]
    assert early[:40] == rates(run)[:40]
    np.testing.assert_allclose(early[40:50], fallen + (1 - fallen) * np.arange(1, 11) / 10, rtol=1e-12)
    few = rates(longer(run, 120, 100, rewarm=True))  # a fifth of 20 updates
    np.testing.assert_allclose(few[100:104], [0.325, 0.55, 0.775, 1], rtol=1e-12)
    assert few[104] == 1.0
    assert few[119] == cosine(19, 20, 1, 0.1, 4)


def test_a_run_may_be_trained_longer_more_than_once() -> None:
    run = of_a_run("--steps", 100)
    more = longer(run, 200, 100, rewarm=True)
    assert more.schedule == ("0-100", "100-200")
    assert longer(more, 200, 150, rewarm=True).schedule == more.schedule  # the same command again, after a stop
    assert longer(more, 300, 200, rewarm=True).schedule == ("0-100", "100-200", "200-300")
    assert longer(more, 300, 200).schedule == more.schedule
    assert longer(more, 300, 70, rewarm=True).schedule == ("0-100", "70-300")  # from an earlier checkpoint
    assert longer(more, 200, 70, rewarm=True).schedule == ("0-100", "70-200")
    assert longer(run, 100, 70, rewarm=True).schedule == ("0-100", "70-100")


def test_a_schedule_given_from_the_beginning() -> None:
    run = of_a_run("--steps", 90, "--schedule", "0-40", "50-80")
    assert rates(run)[:40] == [cosine(step, 40, 1, 0.1, 10) for step in range(40)]
    assert rates(run)[40:50] == rates(run)[80:] == [0.1] * 10
    assert rates(run)[50] == pytest.approx(0.1 + 0.9 / 6)
    for words in (("1-40",), ("0-40", "0-50"), ("0-90", "50-60", "40-70")):
        with pytest.raises(InputError, match="the first span has to begin at 0, and each other after"):
            of_a_run("--schedule", *words)
    for word in ("40", "9-9", "9-8", "-1-3", "0-1e3"):
        with pytest.raises(InputError, match="--schedule"):
            of_a_run("--schedule", word)


def weights_and_moments(run: Path, step: int) -> dict[str, Any]:
    found = load_checkpoint(run / "checkpoints" / f"step-{step}")
    return found[1] | found[2]


def assert_same(run: Path, expected: Path, step: int) -> None:
    assert metrics(run) == metrics(expected)
    assert (run / "samples.md").read_bytes() == (expected / "samples.md").read_bytes()
    ours, theirs = weights_and_moments(run, step), weights_and_moments(expected, step)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    kept = [[path.name for path in checkpoints(r / "checkpoints")] for r in (run, expected)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("rewarm", [False, True])
def test_a_run_trained_longer(rewarm: bool, stub: Stub, place: Path, tmp_path: Path) -> None:
    """Its first part stays; stopped on the way and resumed it ends as the one that went through; and once more."""
    more = ["--steps", 22, *(["--rewarm"] if rewarm else [])]
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    trained(stub, place, through, save_every=9, eval_every=9)
    if not rewarm:  # of an older version, which knew of no schedule
        said = read_sealed(through / "run.json")
        del said["options"]["schedule"]
        write_sealed(through / "run.json", said)
    else:  # with samples of its own kind
        said = read_sealed(through / "run.json") | {"sampling": SAMPLING | {"seed": 3, "top_k": 5}}
        write_sealed(through / "run.json", said)
    shutil.copytree(through, stopped)
    first = metrics(through), weights_and_moments(through, STEPS)
    samples = (through / "samples.md").read_text()
    result = resume(stub, place, through, *more)
    assert result.code == 0, result
    course = "rises again to 2.0e-02" if rewarm else "goes on as it was given (--rewarm raises it again)"
    assert f"other steps than before: 22; the learning rate {course}\n" in result.out
    assert metrics(through)[: STEPS + 1] == first[0]
    assert (through / "samples.md").read_text().startswith(samples)
    for name, array in weights_and_moments(through, STEPS).items():  # kept, although 13 is on no schedule
        np.testing.assert_array_equal(array, first[1][name])
    last = stub.sampled[-1][3]
    assert (last.top_k, last.random.random()) == ((5, first_of(3)) if rewarm else (40, first_of(SEED)))
    lrs = [row["lr"] for row in metrics(through)[STEPS + 1 :]]
    spans = ["0-13", "13-22"] if rewarm else ["0-13"]
    assert lrs[1:] == ([0.02 / (1 + n) for n in range(1, 9)] if rewarm else [0.003] * 8)

    stub.during = lambda step: stop_once(stub) if step == 17 else None
    assert resume(stub, place, stopped, *more).code == 143
    assert resume(stub, place, stopped, *more).code == 0  # the same command: it changes nothing more
    assert_same(stopped, through, 22)
    said = read_sealed(stopped / "run.json")
    assert (said["options"]["steps"], said["options"]["schedule"]) == (22, spans)
    changes = [part.get("changed") for part in said["continued"]]
    assert changes == [{"steps": [13, 22], "schedule": [None, spans]}, None]

    assert resume(stub, place, stopped / "checkpoints" / "step-9").code == 0  # from before it was trained longer
    assert_same(stopped, through, 22)
    if rewarm:
        assert call(stub.main, "--config", through, "--out", tmp_path / "again", cwd=place).code == 0
        weights = [weights_and_moments(run, 22)["wte.weight"] for run in (tmp_path / "again", through)]
        np.testing.assert_array_equal(*weights)
    else:
        assert resume(stub, place, through, "--steps", 25, "--save-every", 2).code == 0
        assert len(metrics(through)) == 26
        kept = {path.name for path in checkpoints(through / "checkpoints")}
        assert {"step-13", "step-22", "step-24", "step-25"} <= kept


def first_of(seed: int) -> float:
    return float(np.random.default_rng(seed).random())


def stop_once(stub: Stub) -> None:
    stub.during = lambda step: None
    os.kill(os.getpid(), signal.SIGTERM)


def test_training_longer_refused(stub: Stub, place: Path, tmp_path: Path) -> None:
    trained(stub, place, tmp_path / "run", save_every=9)
    run = tmp_path / "run"
    before = (run / "run.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    words = f"{run} is finished, with all its 13 steps; add --steps N to train it for N in all"
    refused(resume(stub, place, run), words)
    refused(resume(stub, place, run, "--steps", 13), words)
    refused(resume(stub, place, run, "--steps", 9), f"{run} has done 13 steps already; give --steps above that")
    lone = "--rewarm goes with --resume RUN --steps N; give both, or leave it out"
    refused(resume(stub, place, run, "--rewarm"), lone)
    refused(call(stub.main, *options(out="x", rewarm=True), cwd=place), lone)
    refused(resume(stub, place, run, "--steps", 20, "--lr", 1), "so it goes without --lr")
    assert before == ((run / "run.json").read_bytes(), (run / "metrics.jsonl").read_bytes())
    # from an earlier checkpoint, fewer than it had
    assert resume(stub, place, run / "checkpoints" / "step-9", "--steps", 11).code == 0
    assert json.loads((run / "checkpoints" / "step-11" / "trainer.json").read_bytes())["options"]["steps"] == 11


def test_no_checkpoint_is_lost_to_another_cadence(stub: Stub, place: Path, tmp_path: Path) -> None:
    """--save-every of a run that is trained longer says when to save from now on, and removes nothing."""
    run = tmp_path / "run"
    trained(stub, place, run, steps=8, save_every=2)
    given = ("--resume", run, "--steps", 14, "--save-every", 5)
    assert call(stub.main, *given, cwd=place).code == 0
    assert {path.name for path in (run / "checkpoints").glob("step-*")} >= {
        f"step-{step}" for step in (0, 2, 4, 6, 8, 10, 14)
    }
