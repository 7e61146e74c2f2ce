"""`python -m parity_tests`: its verdict, its certificate, and what it refuses."""

import json
from pathlib import Path

import pytest

from data.config import GPT2Config, parameter_shapes
from data.testing import call, refused, save_model
from parity_tests import __main__ as command
from tinygrad_impl import functional

CONFIG = GPT2Config(vocab_size=199, n_layer=1, n_head=2, n_embd=16, n_positions=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save_model(folder / "model", CONFIG)
    return folder


def options(**changed: object) -> list[str]:
    given = {"model": "model", "device": "CPU", "seq-len": 9, "steps": 2} | changed
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_equal(place: Path) -> None:
    result = call(command.main, *options(json="proof.json", html="proof.html"), cwd=place)
    assert result.code == 0, result
    assert "\nEQUAL (" in result.out
    proof = json.loads((place / "proof.json").read_text(encoding="utf-8"))
    assert (proof["verdict"], proof["culprit"], proof["dtype"], proof["device"]) == ("equal", None, "float32", "CPU")
    assert (proof["model"]["source"], proof["seq_len"], proof["batch_size"], proof["steps"]) == ("model", 9, 2, 2)
    assert proof["command"][:3] == ["python", "-m", "parity_tests"]
    assert {"torch_ref/model.py", "tinygrad_impl/model.py"} <= proof["sources"].keys()
    assert proof["versions"].keys() == {"python", "torch", "tinygrad", "numpy"}
    assert len(proof["model"]["sha256"]) == 64
    gradients = {row["name"] for row in proof["rows"] if row["check"] == "gradient"}
    assert gradients == {*parameter_shapes(CONFIG), "loss", "h.0.attn.c_attn.bias (keys)"}
    page = (place / "proof.html").read_text(encoding="utf-8")
    assert proof["model"]["sha256"] in page


def test_different(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug with NaN: the certificate is JSON all the same."""
    monkeypatch.setattr(functional, "gelu", lambda x, approximate: x.log())
    result = call(command.main, *options(json="broken.json", html="broken.html"), cwd=place)
    assert result.code == 1, result
    assert "\nDIFFERENT: h.0.mlp.gelu forward: error nan" in result.out
    text = (place / "broken.json").read_text(encoding="utf-8")
    proof = json.loads(text, parse_constant=pytest.fail)
    assert proof["verdict"] == "different"
    assert proof["culprit"].startswith("h.0.mlp.gelu forward")
    assert (place / "broken.html").exists()


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"seq-len": 17}, "--seq-len 17 is over the context of 16 tokens"),
        ({"seq-len": 0}, "--seq-len"),
        ({"batch-size": 0}, "--batch-size"),
        ({"steps": 0}, "--steps"),
        ({"dtype": "float16"}, "--dtype"),
        ({"device": "abacus"}, "there is no device ABACUS"),
        ({"json": "nowhere/proof.json"}, "there is no folder nowhere"),
        ({"html": "nowhere/proof.html"}, "there is no folder nowhere"),
    ],
)
def test_bad_options(changed: dict[str, object], word: str, place: Path) -> None:
    refused(call(command.main, *options(**changed), cwd=place), word)


def test_hard_weights_are_not_those_of_a_folder(place: Path) -> None:
    refused(call(command.main, "--model", "model", "--hard", cwd=place), "--hard makes random weights")
