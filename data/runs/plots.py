"""The pictures that a run leaves, drawn with matplotlib: its losses, and what --find-lr found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def picture(path: Path) -> Iterator["Axes"]:
    """Axes to draw on, which are then written to `path` as a PNG."""
    from matplotlib.figure import Figure  # here, because it takes half a second, which training would begin later by

    figure = Figure(figsize=(8, 5), layout="constrained")  # not pyplot's, which is for one thread and for screens
    axes = figure.subplots()
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=120)


def plot_losses(path: Path, title: str, metrics: Sequence[dict[str, Any]]) -> None:
    """Training and validation loss, from the rows of metrics.jsonl."""
    trained = [row for row in metrics if "loss" in row]
    measured = [row for row in metrics if "val_loss" in row]
    with picture(path) as axes:
        axes.plot(
            [r["step"] for r in trained], [r["loss"] for r in trained], lw=1, alpha=0.7, label="training (a batch)"
        )
        axes.plot([r["step"] for r in measured], [r["val_loss"] for r in measured], "o-", ms=4, label="validation")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)


def plot_learning_rates(
    path: Path, rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], proposed: float
) -> None:
    """The loss at each rate that was tried, and the rate that is proposed."""
    with picture(path) as axes:
        axes.semilogx(rates, losses, lw=1, alpha=0.5, label="loss (a batch)")
        axes.semilogx(rates, smoothed, label="smoothed")
        axes.axvline(proposed, ls="--", color="black", lw=1, label=f"proposed: {proposed:.1e}")
        axes.set(xlabel="learning rate", ylabel="loss (nats a token)")
