"""`python -m parity_tests`: its verdict, its figures, its certificate, what its options do, and what it refuses."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.checkpoint import load
from data.checkpoints.config import PRESETS, parameter_count, parameter_shapes
from data.testing import call, refused, save_model
from parity_tests import __main__ as command
from parity_tests import mutants, proof
from parity_tests.bounds import Row
from parity_tests.setting import Setting
from parity_tests.weights import hard_weights, random_weights
from tinygrad_impl import functional

CONFIG = replace(mutants.CONFIG, n_layer=1)  # of the proof's shapes, whose kernels are compiled once for all tests


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save_model(folder / "model", CONFIG)
    return folder


def options(**changed: object) -> list[str]:
    given = {"model": "model", "device": "CPU", "seq-len": mutants.LENGTH, "steps": 2} | changed
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer batches and tokens than the command has otherwise."""
    monkeypatch.setattr(proof, "BATCHES", 2)
    monkeypatch.setattr(command, "prove", partial(proof.prove, generated=12))


@pytest.mark.usefixtures("brief")
def test_equal(place: Path) -> None:
    result = call(command.main, *options(json="proof.json", html="proof.html"), cwd=place)
    assert result.code == 0, result
    assert "\nEQUAL (" in result.out
    found = json.loads((place / "proof.json").read_text(encoding="utf-8"))
    assert (found["verdict"], found["culprit"], found["dtype"], found["device"]) == ("equal", None, "float32", "CPU")
    assert (found["model"]["source"], found["seq_len"], found["batch_size"], found["steps"]) == ("model", 14, 2, 2)
    assert found["model"]["config"]["layer_norm_epsilon"] == 1e-3
    assert found["command"][:3] == ["python", "-m", "parity_tests"]
    assert {"torch_ref/model.py", "tinygrad_impl/kernels/fused.py"} <= found["sources"].keys()
    assert found["revision"].keys() == {"commit", "clean"}
    assert found["versions"].keys() == {"python", "torch", "tinygrad", "numpy"}
    assert len(found["model"]["sha256"]) == 64
    names = {check: {row["name"] for row in found["rows"] if row["check"] == check} for check in command.CHECKS}
    assert names["gradient"] == {*parameter_shapes(CONFIG), "loss", "h.0.attn.c_attn.bias (keys)"}
    of_each = ("inside", "beyond", "probabilities", "tokens")
    assert names["generation"] == {f"{how}.{of}" for how in ("greedy", "sampled") for of in of_each}
    assert {"loss inf", "loss nan", "norm inf", "norm nan", "norm", "loss"} <= names["training"]
    page = (place / "proof.html").read_text(encoding="utf-8")
    assert found["model"]["sha256"] in page
    assert str(found["revision"]["commit"] or "unknown") in page


@pytest.mark.slow  # test_figures has a NaN in the JSON, test_blame.py a sub-layer that is to blame
@pytest.mark.usefixtures("brief")
def test_different(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug with NaN: the certificate is JSON all the same."""
    monkeypatch.setattr(functional, "gelu", lambda x, approximate: x.log())
    result = call(command.main, *options(json="broken.json", html="broken.html"), cwd=place)
    assert result.code == 1, result
    assert "\nDIFFERENT: h.0.mlp.gelu forward: error nan" in result.out
    text = (place / "broken.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["verdict"] == "different"
    assert found["culprit"].startswith("h.0.mlp.gelu forward")
    assert (place / "broken.html").exists()


class Asked:
    """Stands for the proof: keeps what it was asked for, and finds these rows."""

    def __init__(self, rows: list[Row], culprit: str | None = None):
        self.rows, self.culprit = rows, culprit

    def __call__(self, setting: Setting, *how: int) -> tuple[list[Row], str | None]:
        self.setting, self.how = setting, how
        return self.rows, self.culprit


ROWS = [
    Row("forward", "ln_f", 1.5e-7, 4.5e-7, 0.75, 1.2e-7, 2.4e-7),
    Row("backward", "lm_head", 0.0, 0.0, 1.0, 1e-7, 2e-7),
    Row("gradient", "wte.weight", 6e-7, 9e-7, 0.5, 2e-7, 4e-7, "a reason"),
    Row("gradient", "wpe.weight", 1e-7, 1e-7, 1.0, 2e-7, 4e-7),
    Row("training", "norm", math.nan, math.inf, math.nan, None, 3e-13),
    Row("generation", "greedy.tokens", 0.5, 0.5, 1.0, None, 1e-3),
]


def test_figures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed and what is in the JSON, of rows that are known."""
    monkeypatch.setattr(command, "prove", Asked(ROWS, "someone"))
    times = iter([10.0, 73.4])
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(times))
    result = call(command.main, *options(json="figures.json"), cwd=place)
    assert result.code == 1
    lines = result.out.splitlines()
    model = f"model, {parameter_count(CONFIG) / 1e6:.1f}M parameters, CPU"
    assert lines[0].startswith(model)
    assert lines[0].endswith(", float32, 2 x 14 tokens; reference: PyTorch in float64")
    table = [line.split() for line in lines[2:9]]
    assert table[0] == ["check", "tensor", "error", "torch", "own", "allowed", "of", "it"]
    assert table[1:] == [
        ["training", "norm", "nan", "3.0e-13", "inf", "FAILS"],
        ["generation", "greedy.tokens", "5.0e-01", "1.0e-03", "5e+02", "FAILS"],
        ["gradient", "wte.weight", "6.0e-07", "2.0e-07", "4.0e-07", "150%", "FAILS"],
        ["forward", "ln_f", "1.5e-07", "1.2e-07", "2.4e-07", "62%"],
        ["gradient", "wpe.weight", "1.0e-07", "2.0e-07", "4.0e-07", "25%"],
        ["backward", "lm_head", "0.0e+00", "1.0e-07", "2.0e-07", "0%"],
    ]
    counts = [line.split(":")[0].split() for line in lines[10:15]]
    assert counts == [
        ["forward", "1", "compared,", "0", "failed"],
        ["backward", "1", "compared,", "0", "failed"],
        ["gradient", "2", "compared,", "1", "failed"],
        ["training", "1", "compared,", "1", "failed"],
        ["generation", "1", "compared,", "1", "failed"],
    ]
    assert lines[-1] == "DIFFERENT: someone (63 s)"
    found = json.loads((place / "figures.json").read_text(encoding="utf-8"))
    assert (found["verdict"], found["culprit"], found["seconds"]) == ("different", "someone", 63.4)
    assert [row["ratio"] for row in found["rows"]] == pytest.approx([1.25, 0.0, 3.0, 0.5, None, None])
    assert [row["passed"] for row in found["rows"]] == [True, True, False, True, False, False]
    assert found["rows"][2] == vars(ROWS[2]) | {"ratio": found["rows"][2]["ratio"], "passed": False}
    assert found["rows"][4]["error"] is None


def test_no_more_than_the_worst_rows_are_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("gradient", f"tensor{i:02}", i, i, 1.0, None, 100.0) for i in range(30)]
    monkeypatch.setattr(command, "prove", Asked(rows))
    result = call(command.main, *options(), cwd=place)
    assert result.code == 0, result
    shown = [line.split()[1] for line in result.out.splitlines() if line.startswith("gradient  ") and "%" in line]
    assert shown == [f"tensor{i:02}" for i in range(29, 14, -1)]
    assert result.out.splitlines()[-1].startswith("EQUAL (")


def test_options(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrives where it acts, with a value that is no default."""
    asked, opened, chosen = Asked(ROWS[:1]), list[Any](), list[Any]()
    open_device = command.open_device

    def opening(name: str | None) -> str:
        opened.append(name)
        return open_device("CPU")

    monkeypatch.setattr(command, "prove", asked)
    monkeypatch.setattr(command, "open_device", opening)
    monkeypatch.setattr(command, "choose", lambda *given: chosen.append(given))

    def run(*argv: object) -> Setting:
        result = call(command.main, *argv, cwd=place)
        assert result.code == 0, result
        return asked.setting

    tiny = PRESETS["tiny"]
    setting = run()
    assert (setting.config, setting.dtype, asked.how, opened) == (tiny, "float32", (2, 32, 0, 3), [None])
    assert chosen == [("auto", tiny, "CPU", False, None)]
    for name, array in random_weights(tiny, 0).items():
        np.testing.assert_array_equal(setting.arrays[name], array)
    setting = run("--hard", "--seed", 5, "--dtype", "float64", "--batch-size", 3, "--seq-len", 7)
    assert (setting.dtype, asked.how) == ("float64", (3, 7, 5, 10))
    np.testing.assert_array_equal(setting.arrays["wpe.weight"], hard_weights(tiny, 5)["wpe.weight"])
    argv = (
        "--seq-len",
        9,
        "--device",
        "NAME",
        "--dtype",
        "bfloat16",
        "--kernels",
        "fused",
        "--arch",
        "sm_80",
        "--steps",
        4,
        "--json",
        "a",
        "--html",
        "b",
    )
    setting = run("--model", "model", *argv)
    assert (setting.config, setting.dtype, asked.how) == (CONFIG, "bfloat16", (2, 9, 0, 4))
    assert opened[-1] == "NAME"
    assert chosen[-1] == ("fused", CONFIG, "CPU", True, "sm_80")
    np.testing.assert_array_equal(setting.arrays["wte.weight"], load(str(place / "model"))[1]["wte.weight"])
    found = json.loads((place / "a").read_text(encoding="utf-8"))
    assert found["command"] == ["python", "-m", "parity_tests", "--model", "model", *map(str, argv)]
    assert (found["steps"], found["dtype"], found["model"]["source"]) == (4, "bfloat16", "model")
    assert (place / "b").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"seq-len": 17}, "--seq-len 17 is over the context of 16 tokens"),
        ({"seq-len": 0}, "--seq-len"),
        ({"batch-size": 0}, "--batch-size"),
        ({"steps": 0}, "--steps"),
        ({"dtype": "float16"}, "--dtype"),
        ({"device": "abacus"}, "there is no device 'abacus'"),
        ({"json": "nowhere/proof.json"}, "there is no folder nowhere"),
        ({"html": "nowhere/proof.html"}, "there is no folder nowhere"),
    ],
)
def test_bad_options(changed: dict[str, object], word: str, place: Path) -> None:
    refused(call(command.main, *options(**changed), cwd=place), word)


def test_hard_weights_are_not_those_of_a_folder(place: Path) -> None:
    refused(call(command.main, "--model", "model", "--hard", cwd=place), "--hard makes random weights")
