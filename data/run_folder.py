"""The run folder: what a training run leaves behind, and what it resumes from.

    run.json             every option, versions, seed, device, data checksum
    metrics.jsonl        one object a step: step, loss, lr, grad_norm, tokens, seconds, tokens_per_second, and val_loss
                         where it was measured; step 0, before training, has step, tokens, seconds and val_loss alone
    samples.md           what the model wrote, step by step
    loss.png             training and validation loss
    checkpoints/latest   the name of the newest checkpoint
    checkpoints/step-N/  the model after N steps as a Hugging Face folder (config.json, model.safetensors), with
      optimizer.safetensors   AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME
      trainer.json            step, tokens, seconds, and the loader's state

`step` counts updates done; `tokens` and `seconds` count from the run's beginning.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from data.checkpoint import latest_checkpoint, load, read_json, read_safetensors, save, write_safetensors
from data.cli import InputError
from data.config import GPT2Config
from data.files import atomic_write, sync_folder

matplotlib.use("Agg")  # draw to files: a training machine has no screen
import matplotlib.pyplot as plt

END = "\n\n---\n\n"  # of a sample


def section(step: int, text: str) -> str:
    """A sample as it stands in samples.md."""
    return f"## Step {step}\n\n{text}{END}"


def refuse_occupied(path: Path) -> None:
    """Raises `InputError` unless a run can be written to `path`: nothing is there, or an empty folder."""
    if (path / "run.json").exists():
        raise InputError(f"{path} holds a run; pass `--resume {path}` to continue it, or another --out")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there and is not empty; pass another --out")


def read_metrics(path: Path) -> list[Any]:
    """What the lines of a metrics.jsonl say. Overlooks half a line at its end: the run was killed, or is writing it.

    Raises `ValueError` when a whole line is no JSON.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def read_samples(path: Path) -> list[tuple[int, str]]:
    """The (step, text) of each sample in a samples.md; the last may be cut short, as in `read_metrics`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"(?m)^## Step ([0-9]{1,15})\n\n", text)[1:]  # step, sample, step, sample, ...
    return [(int(step), sample.removesuffix(END)) for step, sample in zip(parts[::2], parts[1::2], strict=True)]


class RunFolder:
    """A run's folder, opened to write into."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []  # (step, text)

    @classmethod
    def create(cls, path: Path, run: dict[str, Any]) -> "RunFolder":
        """Makes the folder and its run.json. Raises `InputError` as `refuse_occupied` does."""
        refuse_occupied(path)
        (path / "checkpoints").mkdir(parents=True)
        with atomic_write(path / "run.json", "w") as f:
            f.write(json.dumps(run, indent=2) + "\n")
        return cls(path)

    @classmethod
    def resume(cls, path: Path, step: int) -> "RunFolder":
        """Opens the folder of a stopped run and forgets what it wrote after `step`, its newest checkpoint."""
        folder = cls(path)
        try:
            folder.metrics = [row for row in read_metrics(path / "metrics.jsonl") if row["step"] <= step]
            if [row["step"] for row in folder.metrics] != list(range(step + 1)):
                raise ValueError("a step is missing")
        except (OSError, ValueError, TypeError, KeyError):
            raise InputError(f"{path / 'metrics.jsonl'} is missing or damaged; start a new run") from None
        with atomic_write(path / "metrics.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in folder.metrics)
        if (path / "samples.md").exists():
            folder.samples = [sample for sample in read_samples(path / "samples.md") if sample[0] <= step]
            with atomic_write(path / "samples.md", "w") as f:
                f.writelines(section(*sample) for sample in folder.samples)
        return folder

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Appends one step's object to metrics.jsonl."""
        self.metrics.append(row)
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def add_sample(self, step: int, text: str) -> None:
        """Appends what the model wrote after `step` steps to samples.md."""
        self.samples.append((step, text))
        with open(self.path / "samples.md", "a", encoding="utf-8") as f:
            f.write(section(step, text))

    def draw(self) -> None:
        """Draws loss.png from the metrics."""
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        trained = [row for row in self.metrics if "loss" in row]
        axes.plot(
            [r["step"] for r in trained], [r["loss"] for r in trained], lw=1, alpha=0.7, label="training (a batch)"
        )
        measured = [row for row in self.metrics if "val_loss" in row]
        axes.plot([r["step"] for r in measured], [r["val_loss"] for r in measured], "o-", ms=4, label="validation")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(self.path / "loss.png") as f:
            figure.savefig(f, format="png", dpi=120)
        plt.close(figure)

    def save_checkpoint(
        self, config: GPT2Config, arrays: dict[str, np.ndarray], moments: dict[str, np.ndarray], state: dict[str, Any]
    ) -> Path:
        """Writes checkpoints/step-N, N being state["step"], and then names it in `latest`. Whole, or not there."""
        checkpoints = self.path / "checkpoints"
        folder = checkpoints / f"step-{state['step']}"
        partial = checkpoints / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
        try:
            save(partial, config, arrays)
            write_safetensors(partial / "optimizer.safetensors", moments, {"format": "pt"})
            with atomic_write(partial / "trainer.json", "w") as f:
                f.write(json.dumps(state, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)  # written before, and not named in `latest`
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(checkpoints)
        with atomic_write(checkpoints / "latest", "w") as f:
            f.write(folder.name + "\n")
        return folder


def load_checkpoint(
    run: Path,
) -> tuple[GPT2Config, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """A run's newest checkpoint: configuration, parameters, AdamW's moments, and trainer.json."""
    folder = latest_checkpoint(run)
    config, arrays = load(folder)
    moments = read_safetensors(folder / "optimizer.safetensors")
    shapes = {f"{moment}.{name}": a.shape for moment in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
    if {name: a.shape for name, a in moments.items()} != shapes:
        raise InputError(f"{folder / 'optimizer.safetensors'} does not fit the model beside it; start a new run")
    state = read_json(folder / "trainer.json")
    kinds: dict[str, Any] = {"step": int, "tokens": int, "seconds": (int, float), "loader": dict}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{folder / 'trainer.json'} is damaged; start a new run")
    return config, arrays, moments, state
