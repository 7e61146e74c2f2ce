"""The run folder: what a training run leaves behind, and what it resumes from.

    run.json             every option, versions, git commit, seed, device, checksums of data and weights, and of
                         run.json itself; a run that was continued lists in "continued" from which step, and with what;
                         where it was trained longer, in "changed" by which options, before and since; of several
                         ranks, in "ranks" how many, their hosts and GPUs, and the global batch; for the MFU, where the
                         GPU is known, flops_a_token, and peak_flops of a GPU
    metrics.jsonl        one object a step: step, loss, lr, grad_norm, tokens, seconds, tokens_per_second, and val_loss
                         where it was measured; step 0, before training, has step, tokens, seconds and val_loss alone;
                         last on a line is crc32, of the line without it
    evaluation.json      scores on tasks: rows of task, metric, value, ...; step and weights say of which checkpoint
    samples.md           what the model wrote, step by step
    loss.png             training and validation loss
    tensorboard/         events, where --tensorboard was given
    run.lock             there while a process trains the run, which has it locked
    checkpoints/latest   the name of the newest checkpoint
    checkpoints/best     the name of the one with the lowest validation loss
    checkpoints/step-N/  the model after N steps as a Hugging Face folder (config.json, model.safetensors, and the
      tokenizer's files), with
      optimizer.safetensors   AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME, float32
      trainer.json            step, tokens, seconds, the loader's state, the run's options, and the SHA-256 of
                              metrics.jsonl up to this step
      README.md, loss.png     its model card, for the hub, which may be edited; and the losses until this step
      SHA256SUMS              of all the other files in it but these two

`step` counts updates done; `tokens` and `seconds` count from the run's beginning. This is all the state that a run has:
whichever implementation wrote a checkpoint, the other can go on from it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import latest_checkpoint, read_model, save
from data.checkpoints.config import GPT2Config
from data.checkpoints.sums import CARD, checkpoints, remedy, verify, write_sums
from data.checkpoints.tensors import read_json, read_safetensors, write_safetensors
from data.cli import InputError, counted
from data.files import atomic_write, locked, sync_folder
from data.text.sampling import SAMPLING
from data.text.tokenizer import Tokenizer

END = "\n\n---\n\n"  # of a sample
LOCK = "run.lock"
SCORES = "evaluation.json"


def section(step: int, text: str) -> str:
    """A sample as it stands in samples.md."""
    return f"## Step {step}\n\n{text}{END}"


def digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a JSON object, however it is written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object with its own SHA-256 in it."""
    with atomic_write(file, "w") as f:
        f.write(json.dumps(content | {"sha256": digest(content)}, indent=1) + "\n")


def read_sealed(file: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `InputError` when it is missing, damaged, or not as it was written."""
    content = read_json(file)
    try:
        whole = content.pop("sha256", None) == digest(content)
    except RecursionError:
        whole = False
    if not whole:
        raise InputError(f"{file} is damaged or was changed (its SHA-256 differs); put it back as it was written")
    return content


def change_scores(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """Replaces the rows of a run's evaluation.json by what `change` makes of them, while no other process does so.
    Returns the file.
    """
    file = run / SCORES
    with locked(run / f"{SCORES}.lock", waiting=lambda _: None):
        rows = change(read_sealed(file)["rows"] if file.is_file() else [])
        if rows or file.is_file():
            write_sealed(file, {"rows": rows})
    return file


def run_of(model: str | Path) -> Path | None:
    """The folder of the run that `model` is, or that it is a checkpoint of; None where it is neither."""
    path = Path(model)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    return run if (run / "run.json").is_file() else None


def sampling_of(model: str | Path) -> dict[str, Any]:
    """How a model writes unless told otherwise, as `SAMPLING`: where it is of a run, as the samples of its training."""
    run = run_of(model)
    if run is None:
        return SAMPLING
    run_json = run / "run.json"
    said = read_sealed(run_json)
    older = SAMPLING | {"seed": said.get("seed", SAMPLING["seed"])}  # which say no more than their seed
    sampling = said.get("sampling", older)
    if not isinstance(sampling, dict) or sampling.keys() != SAMPLING.keys() or type(sampling["seed"]) is not int:
        raise InputError(f"{run_json} is of another version of this program; copy a checkpoint out of it and pass that")
    return sampling


def steps_if_finished(run: Path) -> int | None:
    """How many steps a run has, where its latest checkpoint is of the last of them."""
    with suppress(InputError, KeyError, TypeError):
        steps: int = read_sealed(run / "run.json")["options"]["steps"]
        return steps if latest_checkpoint(run).name == f"step-{steps}" else None
    return None


def refuse_occupied(path: Path, find_lr: bool = False) -> None:
    """Raises `InputError` unless a run, or what --find-lr finds, can be written to `path`: nothing is there, or an
    empty folder.
    """
    if (path / "run.json").exists():
        how, steps = f"pass `--resume {quote(str(path))}", steps_if_finished(path)
        if find_lr:
            how = "pass another --out"
        elif steps is None:
            how += "` to continue it, or another --out"
        else:
            how += f" --steps {2 * steps}` to train it longer than its {counted(steps, 'step')}, or another --out"
        raise InputError(f"{path} holds a run; {how}")
    # a run that was killed at its very beginning left no more than these
    if os.path.lexists(path) and not (path.is_dir() and set(os.listdir(path)) <= {"run.json.tmp", LOCK}):
        raise InputError(f"{path} is there and is not empty; pass another --out")


def checked_line(row: dict[str, Any]) -> str:
    """A line of metrics.jsonl."""
    line = json.dumps(row)
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}\n'


def read_line(line: bytes) -> Any:
    """What `checked_line` was given. Raises `ValueError` when it is not as it was written."""
    row = json.loads(line)
    if not isinstance(row, dict) or row.pop("crc32", None) is None or checked_line(row).encode() != line:
        raise ValueError("a line is not as it was written")
    return row


def read_metrics(run: Path) -> list[Any]:
    """What the lines of a run's metrics.jsonl say. Overlooks half a line at its end: the run was killed, or is writing.

    Raises `ValueError` when a line is not as it was written, or they are not those of the latest checkpoint.
    """
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    if (run / "checkpoints" / "latest").exists():
        state = read_json(latest_checkpoint(run) / "trainer.json")
        vouched = b"".join(lines[: state["step"] + 1])
        if hashlib.sha256(vouched).hexdigest() != state["metrics"]:
            raise ValueError("other bytes than were written")
    return [read_line(line) for line in lines if line.endswith(b"\n")]


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
        self.ends: set[int] = set()  # the steps that it was to have before it was trained longer
        self.cadences: set[int] = set()  # the --save-every that it had before
        self._sha256 = hashlib.sha256()  # of metrics.jsonl

    @classmethod
    def create(cls, path: Path, run: dict[str, Any]) -> "RunFolder":
        """Makes the folder and its run.json. Raises `InputError` as `refuse_occupied` does."""
        refuse_occupied(path)
        path.mkdir(parents=True, exist_ok=True)
        write_sealed(path / "run.json", run)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, state: dict[str, Any] | None, origin: dict[str, Any]) -> "RunFolder":
        """Opens the folder of a stopped run at a checkpoint, whose trainer.json says `state`, and forgets what was
        written after it; without a state, at the very beginning. `origin` is added to run.json's "continued", and what
        it says to be "changed" to the options.
        """
        folder = cls(path)
        run = read_sealed(path / "run.json")
        kept = b""
        if state:
            try:
                # a run that was killed may have left half a line at the end
                lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[: state["step"] + 1]
                kept = b"".join(lines)
                folder._sha256.update(kept)
                if folder._sha256.hexdigest() != state["metrics"]:
                    raise ValueError("other bytes than were written")
                folder.metrics = [read_line(line) for line in lines]
            except (OSError, ValueError):
                whole = path / "checkpoints" / f"step-{state['step']}"
                raise InputError(
                    f"{path / 'metrics.jsonl'} is missing or damaged; "
                    f"begin a run with `--init {quote(str(whole))}`, which is whole"
                ) from None
        step = state["step"] if state else -1
        change_scores(path, lambda rows: [row for row in rows if (row.get("step") or 0) <= step])
        if state:
            folder._say_what_is_removed(state["step"])
            # first, because of what comes after it no metrics will be left
            folder.name("latest", f"step-{state['step']}")
        for left in path.glob("checkpoints/*.partial"):
            shutil.rmtree(left)
        parts = [*run.get("continued", []), origin]
        changed = [part.get("changed", {}) for part in parts]
        folder.ends = {options["steps"][0] for options in changed if "steps" in options}
        folder.cadences = {options["save_every"][0] for options in changed if "save_every" in options}
        if "changed" in origin:
            run["options"] |= {name: now for name, (_, now) in origin["changed"].items()}
        write_sealed(path / "run.json", run | {"continued": parts})
        with atomic_write(path / "metrics.jsonl") as f:
            f.write(kept)
        if (path / "samples.md").exists():
            written = read_samples(path / "samples.md")
            folder.samples = [sample for sample in written if state and sample[0] <= state["step"]]
            with atomic_write(path / "samples.md", "w") as f:
                f.writelines(section(*sample) for sample in folder.samples)
        if state:
            folder.prune(range(state["step"] + 1))
        return folder

    def _say_what_is_removed(self, step: int) -> None:
        """Where there are checkpoints of later steps; what was measured since the latest is no more than half done."""
        found = (int(path.name.removeprefix("step-")) for path in checkpoints(self.path / "checkpoints"))
        if later := sorted(other for other in found if other > step):
            which = ", ".join(f"step-{other}" for other in later)
            print(
                f"note: {self.path} was trained to step {later[-1]} and goes back to step {step}: its later "
                f"checkpoints ({which}) are removed now, and what was measured and sampled after step {step}",
                file=sys.stderr,
                flush=True,
            )

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Appends one step's object to metrics.jsonl."""
        line = checked_line(row)
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(line)
        self.metrics.append(row)
        self._sha256.update(line.encode())

    def add_sample(self, step: int, text: str) -> None:
        """Appends what the model wrote after `step` steps to samples.md."""
        self.samples.append((step, text))
        with open(self.path / "samples.md", "a", encoding="utf-8") as f:
            f.write(section(step, text))

    def metrics_sha256(self) -> str:
        """The SHA-256 of metrics.jsonl as it is now."""
        return self._sha256.hexdigest()

    def save_checkpoint(
        self,
        config: GPT2Config,
        arrays: dict[str, np.ndarray],
        moments: dict[str, np.ndarray],
        state: dict[str, Any],
        tokenizer: Tokenizer | None = None,
        metrics: str | None = None,
        card: str | None = None,
    ) -> Path:
        """Writes checkpoints/step-N, N being state["step"], and then names it in `latest`. Whole, or not there.

        `metrics` is what `metrics_sha256` was then, if lines may have been added since; `card` is its model card.
        """
        folder = self.path / "checkpoints" / f"step-{state['step']}"
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
        try:
            partial.mkdir(parents=True)
            with open(self.path / "metrics.jsonl", "ab") as f:  # the checkpoint says what is in it
                os.fsync(f.fileno())
            written = save(partial, config, arrays, tokenizer)
            optimizer = partial / "optimizer.safetensors"
            written[optimizer.name] = write_safetensors(optimizer, moments, {"format": "pt"})
            with atomic_write(partial / "trainer.json", "w") as f:
                f.write(json.dumps(state | {"metrics": metrics or self.metrics_sha256()}, indent=2) + "\n")
            if card is not None:
                with atomic_write(partial / CARD, "w") as f:
                    f.write(card)
            write_sums(partial, written)
            shutil.rmtree(folder, ignore_errors=True)  # written before, and not named in `latest`
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder.parent)
        self.name("latest", folder.name)
        return folder

    def name(self, role: str, checkpoint: str) -> None:
        """Has the file `latest` or `best` name a checkpoint."""
        with atomic_write(self.path / "checkpoints" / role, "w") as f:
            f.write(checkpoint + "\n")

    def prune(self, steps: Collection[int]) -> None:
        """Removes all checkpoints but those of these steps."""
        for path in checkpoints(self.path / "checkpoints"):
            if int(path.name.removeprefix("step-")) not in steps:
                gone = path.with_name(f"{path.name}.partial")
                os.rename(path, gone)  # a run that is killed meanwhile leaves no half checkpoint of this name
                shutil.rmtree(gone)


def load_checkpoint(
    folder: Path,
) -> tuple[GPT2Config, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """A checkpoint of a run: configuration, parameters, AdamW's moments, and trainer.json. Raises `InputError` where
    it is not as it was written, naming the newest one that is.
    """
    verify(folder)
    return read_checkpoint(folder)


def read_checkpoint(
    folder: Path,
) -> tuple[GPT2Config, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """What `load_checkpoint` gives, whatever SHA256SUMS says."""
    config, arrays = read_model(folder)
    moments = read_safetensors(folder / "optimizer.safetensors")
    shapes = {f"{moment}.{name}": a.shape for moment in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
    if {name: a.shape for name, a in moments.items()} != shapes:
        raise InputError(f"{folder / 'optimizer.safetensors'} does not fit the model beside it; {remedy(folder)}")
    state = read_json(folder / "trainer.json")
    kinds: dict[str, Any] = {"step": int, "tokens": int, "seconds": (int, float), "metrics": str}
    kinds |= {"loader": dict, "options": dict}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{folder / 'trainer.json'} is damaged; {remedy(folder)}")
    return config, arrays, moments, state
