"""The command, without the harness."""

from pathlib import Path

import numpy as np
import pytest

from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.cli import InputError
from data.evaluation import command
from data.testing import save_model
from data.text.tokenizer import gpt2


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_damaged_weights_are_named(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is opened or computed."""
    monkeypatch.setattr(command, "require_harness", lambda: None)
    folder = save_model(tmp_path / "whole", GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=32))
    config, arrays = load(folder)
    arrays["wpe.weight"][3, 1] = value
    save(tmp_path / "damaged", config, arrays, gpt2())
    words = ["--model", str(tmp_path / "damaged"), "--tasks", "stories"]
    said = "damaged: of the 64 values of wpe.weight, NaN or infinity: 1; these weights are damaged"
    with pytest.raises(InputError, match=said):
        command.evaluate(command.parser("it", "it").parse_args(words), "it", lambda *_: pytest.fail("it was opened"))
