"""The catalogue of mutants, a few of which are planted here; `python -m parity_tests.mutants` plants them all."""

from pathlib import Path

import pytest

from data.testing import call, refused
from parity_tests import mutants
from parity_tests.mutants import MUTANTS, Mutant, checked, edited
from tinygrad_impl import trainer

STEPS = 3
CHEAP = ("loader", "checkpoint", "generation")
FEW = {
    "softmax in bfloat16": "float32",
    "decay of biases and gains too": "float64",
    "schedule off by one": "float64",
    "replay on the batch that was captured": "float64",
}


def test_every_mutant_can_be_planted() -> None:
    """The words that it exchanges are still there, and are back afterwards."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 100
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


@pytest.mark.parametrize("where", CHEAP)
def test_no_false_alarm(where: str) -> None:
    """Of the checks here; test_model.py has those of the proof."""
    assert checked(where, "", 0, STEPS) is None


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.where in CHEAP], ids=lambda m: f"{m.where}: {m.name}")
def test_caught_by_a_check_of_its_own(mutant: Mutant) -> None:
    with mutant.plant():
        said = checked(mutant.where, "", 0, STEPS)
    assert mutant.names(said), said


@pytest.mark.parametrize("name", FEW)
def test_caught_by_the_proof(name: str) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    with mutant.plant():
        said = checked(mutant.where, FEW[name], 0, STEPS)
    assert mutant.names(said), said


def test_bad_options(tmp_path: Path) -> None:
    refused(call(mutants.main, "--only", "no such mutant", cwd=tmp_path), "no mutant has 'no such mutant' in its name")
    refused(call(mutants.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
