"""The pictures of a run. What --find-lr draws is in test_find_lr.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from data.runs.plots import plot_losses
from data.runs.tests.support import drawings

METRICS = [{"step": 0, "val_loss": 9.0}, {"step": 1, "loss": 8.0}, {"step": 2, "loss": 6.5, "val_loss": 7.0}]


def test_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawings(monkeypatch)
    plot_losses(tmp_path / "loss.png", "a run", METRICS)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (picture,) = drawn
    assert picture.lines == {"training (a batch)": ([1, 2], [8.0, 6.5]), "validation": ([0, 2], [9.0, 7.0])}
    assert picture.legend == ["training (a batch)", "validation"]
    assert (picture.title, picture.xlabel, picture.ylabel) == ("a run", "step", "loss (nats a token)")


def test_pictures_are_closed(tmp_path: Path) -> None:
    """Matplotlib keeps the others, and warns from the 20th on."""
    for _ in range(2):
        plot_losses(tmp_path / "loss.png", "a run", METRICS)
    assert plt.get_fignums() == []
