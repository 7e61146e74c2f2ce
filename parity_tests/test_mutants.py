"""The catalogue of mutants, a few of which are planted here; `python -m parity_tests.mutants` plants them all."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.testing import call, refused
from parity_tests import mutants
from parity_tests.mutants import MUTANTS, Mutant, checked, configuration, edited
from tinygrad_impl import trainer

STEPS = 3
CHEAP = ("loader", "checkpoint", "generation")
FEW = {
    "softmax in bfloat16": "float32",
    "decay of biases and gains too": "float64",
    "schedule off by one": "float64",
    "replay on the batch that was captured": "float64",
    "layer norm's eps 1e-5 for every model": "float32",
    "micro-batches past the second are left out": "float64",
    "an infinite norm updates the weights": "float32",
}


def slow_but_for_the_loader(where: str) -> list[pytest.MarkDecorator]:
    """The others compile graphs of their own. test_interchange.py and test_generation_check.py guard the same."""
    return [] if where == "loader" else [pytest.mark.slow]


def test_every_mutant_can_be_planted() -> None:
    """The words that it exchanges are still there, and are back afterwards."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) == 167
    original = trainer.Trainer.adamw
    for mutant in MUTANTS:
        with mutant.plant():
            pass
    assert trainer.Trainer.adamw is original


def test_an_edit_of_words_that_are_not_there() -> None:
    with pytest.raises(LookupError, match="learning_rate has 0 times 'no such words'"):
        edited(trainer.learning_rate, ("no such words", "others"))
    with pytest.raises(LookupError, match="learning_rate has 6 times 'warmup'"):
        edited(trainer.learning_rate, ("warmup", "steps"))


@pytest.mark.parametrize("where", [pytest.param(where, marks=slow_but_for_the_loader(where)) for where in CHEAP])
def test_no_false_alarm(where: str) -> None:
    """Of the checks here; test_model.py has those of the proof."""
    assert checked(where, "", 0, STEPS) is None


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=f"{m.where}: {m.name}", marks=slow_but_for_the_loader(m.where))
        for m in MUTANTS
        if m.where in CHEAP
    ],
)
def test_caught_by_a_check_of_its_own(mutant: Mutant) -> None:
    with mutant.plant():
        verdict = checked(mutant.where, "", 0, STEPS)
    assert mutant.names(verdict), verdict


@pytest.mark.slow  # test_blame.py and test_gate.py have the culprits of one sub-layer, of AdamW and of accumulation
@pytest.mark.parametrize("name", FEW)
def test_caught_by_the_proof(name: str) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    with mutant.plant():
        verdict = checked(mutant.where, FEW[name], 0, STEPS)
    assert mutant.names(verdict), verdict


def test_the_result_of_a_check() -> None:
    planted = mutants.work(("the same order in every epoch", "loader", "", 0, STEPS))
    assert (planted.mutant, planted.where, planted.named) == ("the same order in every epoch", "loader", True)
    assert planted.by == "loader: order of the windows"
    clean = mutants.work((None, "loader", "", 0, STEPS))
    assert (clean.mutant, clean.by, clean.named) == (None, None, False)
    assert 0 < clean.seconds < 600


def result(mutant: str | None, by: str | None, named: bool = False, what: str = "") -> mutants.Result:
    return mutants.Result(mutant, "proof", "float64", by, named, 1.0, what)


class Pool:
    """Stands for the processes: keeps what they were asked for, and gives these results."""

    def __init__(self, results: list[mutants.Result]):
        self.results = results

    def __call__(self, jobs: int, *_: object, **__: object) -> "Pool":
        self.jobs = jobs
        return self

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap(self, work: object, todo: list[mutants.Task]) -> list[mutants.Result]:
        self.todo = todo
        return self.results


RIGHT, WRONG, MISSED = (result("m", "clipping", True), result("m2", "loss"), result("m3", None))
QUIET, ALARM = result(None, None), result(None, "loss", what="the model")


@pytest.mark.parametrize(
    ("results", "code", "words"),
    [
        ([RIGHT] * 20 + [QUIET], 0, "1 mutants, 20 checks of them: 20 caught, 20 named right; 1 checks without one: 0"),
        ([RIGHT] * 19 + [WRONG], 0, "2 mutants, 20 checks of them: 20 caught, 19 named right; 0 checks without one: 0"),
        ([RIGHT] * 18 + [WRONG] * 2, 1, "2 mutants, 20 checks of them: 20 caught, 18 named right"),
        ([RIGHT] * 30 + [MISSED], 1, "2 mutants, 31 checks of them: 30 caught, 30 named right"),
        ([RIGHT] * 20 + [ALARM, QUIET], 1, "2 checks without one: 1 false alarms"),
    ],
)
def test_figures(
    results: list[mutants.Result], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(results)
    monkeypatch.setattr(mutants.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=pool))
    found = call(mutants.main, "--only", "clipping without its", "--json", "found.json", cwd=tmp_path)
    assert found.code == code, found
    assert words in found.out
    written = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    planted = [r for r in results if r.mutant]
    assert written["checks"] == len(planted)
    assert written["caught"] == sum(r.by is not None for r in planted)
    assert written["named"] == sum(r.named for r in planted)
    assert (written["clean"], written["false_alarms"]) == (len(results) - len(planted), results.count(ALARM))
    assert written["results"] == [vars(r) for r in results]
    assert ("FALSE ALARM: proof float64: loss\n  the model" in found.out + found.err) == (ALARM in results)


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrives where it acts, with a value that is no default."""
    pool = Pool([RIGHT])
    monkeypatch.setattr(mutants.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=pool))
    name = "clipping without its 1e-6"
    assert call(mutants.main, "--only", name, "--jobs", 9, cwd=tmp_path).code == 0
    clean = [(None, "proof", dtype, 0, 6) for dtype in ("float64", "float32")]
    assert pool.todo == [(name, "proof", "float64", 0, 6), (name, "proof", "float32", 0, 6), *clean]
    assert pool.jobs == 4  # no more processes than checks
    argv = ("--only", name, "--dtype", "float32", "--seed", 3, "--steps", 2, "--configs", 2, "--jobs", 2)
    assert call(mutants.main, *argv, cwd=tmp_path).code == 0
    random = [(None, "configuration", number, 3, 2) for number in ("0", "1")]
    assert pool.todo == [(name, "proof", "float32", 3, 2), (None, "proof", "float32", 3, 2), *random]
    assert pool.jobs == 2


def test_random_models_vary_all_that_a_configuration_can_bring() -> None:
    made = [configuration(number, 0) for number in range(24)]
    configs = [setting.config for setting, *_ in made]
    assert {config.layer_norm_epsilon for config in configs} == {1e-5, 1e-6, 1e-3}
    assert {setting.dtype for setting, *_ in made} == {"float64", "float32"}
    full = [length == config.n_positions for config, (_, _, length, _) in zip(configs, made, strict=True)]
    assert 0 < sum(full) < 24
    for of in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
        assert len({getattr(config, of) for config in configs}) > 2
    assert configuration(3, 1)[0].config != configuration(3, 0)[0].config
    ordinary = [float(setting.arrays["wte.weight"].std()) for setting, *_, what in made if "random_weights" in what]
    assert 0 < sum(spread < 0.03 for spread in ordinary) == len(ordinary) - sum(spread > 0.15 for spread in ordinary)
    assert max(ordinary) > 0.15


def test_bad_options(tmp_path: Path) -> None:
    refused(call(mutants.main, "--only", "no such mutant", cwd=tmp_path), "no mutant has 'no such mutant' in its name")
    refused(call(mutants.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
