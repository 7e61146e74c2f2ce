"""What a run keeps of its training: metrics, samples and checkpoints, in its folder and as TensorBoard's events."""

import errno
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.checkpoints.config import parameter_count
from data.checkpoints.sums import checkpoints
from data.cli import InputError, Progress, command
from data.runs.implementation import Implementation
from data.runs.plots import plot_losses
from data.runs.revision import revision
from data.runs.run_folder import RunFolder, sampling_of, write_sealed
from data.runs.start import Start
from data.text.sampling import SAMPLING, Sampler

PROMPT = "Once upon a time"


class Recorder:
    """Opens the folder of a run, and writes there what its training comes to.

    `files` are JSON objects to keep in the folder, by name. Raises `InputError` as `RunFolder` does.
    """

    def __init__(self, start: Start, by: Implementation, files: Mapping[str, Any]):
        self.start, self.by, self.options = start, by, start.options
        if start.options.resume:  # a run that goes on writes as it began, whatever the defaults are now
            assert start.options.out
            self.sampling = sampling_of(start.options.out)
        else:
            self.sampling = SAMPLING | {"seed": start.options.seed}
        self.folder = self._open_folder()
        self._compiled: set[str] = set()  # of what is shown in a bar of its own
        self.saved_step = -1  # of the last checkpoint written here
        self.resuming = command(f"{by.package}.train", "--resume", self.folder.path)  # the command that goes on
        for name, content in files.items():
            write_sealed(self.folder.path / name, content)
        self.events = None
        if self.options.tensorboard:
            from tensorboardX import SummaryWriter  # here, because it takes long

            # what was shown from the next step on is of a run that was cut off
            self.events = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=start.state["step"] + 1)

    def _open_folder(self) -> RunFolder:
        start, by, options = self.start, self.by, self.options
        packages = ("tinygrad" if by.package == "tinygrad_impl" else "torch", "numpy", "tiktoken", "safetensors")
        origin = {
            "command": ["python", "-m", f"{by.package}.train", *sys.argv[1:]],
            "device": by.device,
            "card": by.device_name,
            **({"kernels": by.kernels} if by.kernels else {}),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "source": revision(),
            **start.machines,
        }
        assert options.out  # `begin` has it
        if options.resume:  # not before now, because it cuts off what came after the checkpoint
            state = start.state if start.moments else None
            changed = {"changed": start.changed} if start.changed else {}
            return RunFolder.resume(options.out, state, {"step": start.state["step"], **origin, **changed})
        return RunFolder.create(options.out, {**origin, **start.described(), "sampling": self.sampling})

    def metrics(self, row: dict[str, Any]) -> None:
        """Keeps what was measured of a step."""
        self.folder.add_metrics(row)
        if self.events:
            for name in row.keys() - {"step", "tokens", "seconds"}:
                self.events.add_scalar(name, row[name], row["step"])

    def sample(self) -> None:
        """Lets the model write, always with the same random numbers, and keeps the text."""
        step, settings = self.by.trainer.steps, dict(self.sampling)
        tokens = settings.pop("max_new_tokens")
        with self.progress("a sample", tokens, "token") as progress:
            text = self.by.continue_text(PROMPT, tokens, Sampler(**settings), progress.update)
        self.folder.add_sample(step, text)
        if self.events:
            self.events.add_text("sample", text, step)

    def progress(self, what: str, total: int, unit: str, **more: Any) -> Progress:
        """Shows how far something is that training waits for, and that compiles when it is done the first time."""
        compiling = 0 if what in self._compiled else self.by.compiling
        self._compiled.add(what)
        training = self.by.trainer.steps > self.start.state["step"] or self.start.moments is not None
        return Progress(
            total=total, desc=what, unit=unit, compiling=compiling, part=training, disable=self.options.quiet, **more
        )

    def checkpoint(self, tokens: int, seconds: float) -> None:
        """Saves a checkpoint, after which only those are left that are to be kept, and draws the losses so far."""
        options, folder, step = self.options, self.folder, self.by.trainer.steps
        # nothing is kept that damaged tokens may have trained
        self.start.verification.check(timeout=None if step else 0)
        state = {"step": step, "tokens": tokens, "seconds": seconds, "loader": self.start.loader.state()}
        state |= {"options": options.recorded()}
        arrays, tokenizer = self.by.trainer.model.arrays(), self.start.tokenizer
        folder.save_checkpoint(self.start.config, arrays, self.by.moments(), state, tokenizer)
        self.saved_step = step
        best = min((row for row in folder.metrics if "val_loss" in row), key=lambda row: row["val_loss"])["step"]
        there = [int(path.name.removeprefix("step-")) for path in checkpoints(folder.path / "checkpoints")]
        ends, cadences = {options.steps, *folder.ends}, {options.save_every, *folder.cadences}
        scheduled = [n for n in there if n and (n in ends or any(n % every == 0 for every in cadences))]
        if best in there:
            folder.name("best", f"step-{best}")
        folder.prune({0, best, step, *scheduled[-(options.keep or len(there)) :]})
        if self.events:
            self.events.flush()
        if step:
            model, text = (Path(str(name)).name for name in (options.preset or options.init, options.data))
            title = f"{model}, {parameter_count(self.start.config) / 1e6:.1f}M parameters, on {text}"
            plot_losses(folder.path / "loss.png", title, folder.metrics)

    @contextmanager
    def room_on_disk(self) -> Iterator[None]:
        """Where the disk is full, says how to go on once there is room."""
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            there = (self.folder.path / "checkpoints" / "latest").exists()
            go_on = (
                f"go on from the newest checkpoint, which is whole, with `{self.resuming}`"
                if there
                else "begin again, in another --out"
            )
            step, path = self.by.trainer.steps, self.folder.path
            raise InputError(f"{e.strerror}: step {step} could not be saved in {path}; make room and {go_on}") from None

    def close(self) -> None:
        if self.events:
            self.events.close()
