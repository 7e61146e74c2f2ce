"""What a run keeps of its training: metrics, samples and checkpoints, in its folder and as TensorBoard's events."""

import errno
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.config import flops_a_token, parameter_count
from data.checkpoints.sums import CURVE, checkpoints
from data.cli import InputError, Progress
from data.launch import command_as_started, with_option
from data.runs.card import card
from data.runs.implementation import Implementation
from data.runs.options import Options
from data.runs.plots import plot_losses
from data.runs.revision import revision
from data.runs.run_folder import RunFolder, sampling_of, write_sealed
from data.runs.saving import Saver
from data.runs.start import Start
from data.runs.together import by_rank_0, on_all
from data.text.sampling import SAMPLING, Sampler

PROMPT = "Once upon a time"


class Recorder:
    """Opens the folder of a run, and writes there what its training comes to.

    `files` are JSON objects to keep in the folder, by name. Raises `InputError` as `RunFolder` does. Of several ranks
    the first alone has the files; the others know what they say of the steps so far.
    """

    def __init__(self, start: Start, by: Implementation, files: Mapping[str, Any]):
        self.start, self.by, self.options = start, by, start.options
        self.writes = start.ranks.rank == 0
        self.events: Any = None
        self.folder = self._open_on_all(files)
        self.saver = Saver()
        self._compiled: set[str] = set()  # of what is shown in a bar of its own
        self.saved_step = -1  # of the last checkpoint that was begun here
        timeout = ["--timeout", self.options.timeout] if self.options.timeout != Options.timeout else []
        self.resuming = command_as_started(  # the command that goes on
            f"{by.package}.train", "--resume", self.folder.path, *timeout
        )
        start.ranks.resume_with(self.resuming)

    def _open_on_all(self, files: Mapping[str, Any]) -> RunFolder:
        """The folder, which the first rank has opened and cut back; to the others it is what they know of it."""
        opened = list[RunFolder]()

        def open_folder() -> tuple[Any, ...]:
            folder = self._open(files)
            opened.append(folder)
            return folder.path, folder.metrics, folder.samples, folder.ends, folder.cadences

        path, *known = by_rank_0(self.start.ranks, open_folder)
        if opened:
            return opened[0]
        folder = RunFolder(path)
        folder.metrics, folder.samples, folder.ends, folder.cadences = known
        return folder

    def _open(self, files: Mapping[str, Any]) -> RunFolder:
        options = self.options
        if options.resume:  # a run that goes on writes as it began, whatever the defaults are now
            assert options.out
            self.sampling = sampling_of(options.out)
        else:
            self.sampling = SAMPLING | {"seed": options.seed}
        folder = self._open_folder()
        for name, content in files.items():
            write_sealed(folder.path / name, content)
        if options.tensorboard:
            from tensorboardX import SummaryWriter  # here, because it takes long

            # what was shown from the next step on is of a run that was cut off
            self.events = SummaryWriter(str(folder.path / "tensorboard"), purge_step=self.start.state["step"] + 1)
        return folder

    def _open_folder(self) -> RunFolder:
        start, by, options = self.start, self.by, self.options
        packages = ("tinygrad" if by.package == "tinygrad_impl" else "torch", "numpy", "tiktoken", "safetensors")
        origin = {
            "command": ["python", "-m", f"{by.package}.train", *sys.argv[1:], *with_option()],
            "device": by.device,
            "card": by.device_name,
            **({"kernels": by.kernels} if by.kernels else {}),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "source": revision(),
            **start.machines,
        }
        if by.peak_flops:  # for the MFU; of each GPU
            origin["peak_flops"] = by.peak_flops
            origin["flops_a_token"] = flops_a_token(start.config, options.seq_len)
        assert options.out  # `begin` has it
        if options.resume:  # not before now, because it cuts off what came after the checkpoint
            state = start.state if start.moments else None
            changed = {"changed": start.changed} if start.changed else {}
            return RunFolder.resume(options.out, state, {"step": start.state["step"], **origin, **changed})
        return RunFolder.create(options.out, {**origin, **start.described(), "sampling": self.sampling})

    def metrics(self, row: dict[str, Any]) -> None:
        """Keeps what was measured of a step."""
        if not self.writes:
            self.folder.metrics.append(row)
            return
        self.folder.add_metrics(row)
        if self.events:
            for name in row.keys() - {"step", "tokens", "seconds"}:
                self.events.add_scalar(name, row[name], row["step"])

    def sample(self) -> None:
        """Lets the model write on the first rank, always with the same random numbers, and keeps the text."""
        if not self.writes:
            return
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
            total=total,
            desc=what,
            unit=unit,
            compiling=compiling,
            part=training,
            disable=self.options.quiet or not self.writes,
            **more,
        )

    def checkpoint(self, tokens: int, seconds: float) -> None:
        """Has a checkpoint of this moment saved while training goes on, once the one before it is. All ranks call it,
        and all of them raise why that one could not be saved.
        """
        step = self.by.trainer.steps
        self.wait()
        if self.start.ranks.size > 1 and step:  # the thread waits for the first rank's own tokens alone
            on_all(self.start.ranks, partial(self.start.verification.check, timeout=None))
        arrays, moments = self.by.arrays(self.writes), self.by.moments(self.writes)
        self.saved_step = step
        if not self.writes:
            return
        state = {"step": step, "tokens": tokens, "seconds": seconds, "loader": self.start.loader.state()}
        state |= {"options": self.options.recorded()}
        vouched = self.folder.metrics_sha256(), list(self.folder.metrics)  # lines are added while it is written
        self.saver.begin(partial(self._save, arrays, moments, state, *vouched))
        if self.events:
            self.events.flush()

    def _save(
        self,
        arrays: dict[str, np.ndarray],
        moments: dict[str, np.ndarray],
        state: dict[str, Any],
        vouched: str,
        metrics: list[dict[str, Any]],
    ) -> None:
        """Writes a checkpoint, after which only those are left that are to be kept, and draws the losses until then."""
        options, folder, step, tokenizer = self.options, self.folder, state["step"], self.start.tokenizer
        with self.room_on_disk(step):
            # nothing is kept that damaged tokens may have trained
            self.start.verification.check(timeout=None if step else 0)
            page = self._card(state, metrics)
            saved = folder.save_checkpoint(self.start.config, arrays, moments, state, tokenizer, vouched, page)
            best = min((row for row in metrics if "val_loss" in row), key=lambda row: row["val_loss"])["step"]
            there = [int(path.name.removeprefix("step-")) for path in checkpoints(folder.path / "checkpoints")]
            ends, cadences = {options.steps, *folder.ends}, {options.save_every, *folder.cadences}
            scheduled = [n for n in there if n and (n in ends or any(n % every == 0 for every in cadences))]
            if best in there:
                folder.name("best", f"step-{best}")
            folder.prune({0, best, step, *scheduled[-(options.keep or len(there)) :]})
            if step:
                model, text = (Path(str(name)).name for name in (options.preset or options.init, options.data))
                title = f"{model}, {parameter_count(self.start.config) / 1e6:.1f}M parameters, on {text}"
                plot_losses(folder.path / CURVE, title, metrics)
                with suppress(FileNotFoundError):
                    shutil.copyfile(folder.path / CURVE, saved / CURVE)  # which its card shows

    def _card(self, state: dict[str, Any], metrics: list[dict[str, Any]]) -> str | None:
        """The checkpoint's model card. What is wrong with it must not cost the checkpoint: then there is none."""
        try:
            return card(self.folder.path, state, metrics, list(self.folder.samples))
        except Exception as e:
            Progress.write(f"note: step {state['step']} is saved without a model card ({e})", file=sys.stderr)
            return None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be saved. Only the first rank knows it; then all have to `wait`."""
        return self.saver.failed

    def wait(self) -> None:
        """On all ranks, until the checkpoint that is being written, if one is, is there. Raises on all of them why it
        could not be saved.
        """
        on_all(self.start.ranks, self._wait, has_part=self.writes)

    def _wait(self) -> None:
        self.saver.wait(self._say_what_is_awaited)

    def _say_what_is_awaited(self) -> None:
        if not self.options.quiet:
            Progress.write(f"waiting until step {self.saved_step} is saved", file=sys.stderr)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """However this is left, the checkpoint that was being written is there, or all ranks raise why it is not."""
        try:
            yield
        except BaseException:
            self._wait()
            raise
        self.wait()

    @contextmanager
    def room_on_disk(self, saving: int | None = None) -> Iterator[None]:
        """Where the disk is full, says how to go on once there is room. `saving`: the step to name, if not the last."""
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
            step, path = self.by.trainer.steps if saving is None else saving, self.folder.path
            raise InputError(f"{e.strerror}: step {step} could not be saved in {path}; make room and {go_on}") from None

    def close(self) -> None:
        if self.events:
            self.events.close()
