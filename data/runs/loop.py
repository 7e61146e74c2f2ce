"""The training loop, whichever implementation computes the steps."""

import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from shlex import quote
from typing import Any

from data.checkpoints.checkpoint import latest_checkpoint
from data.checkpoints.config import flops_a_token, parameter_count
from data.cli import InputError, Progress, command
from data.evaluation.scores import columns, score_rows
from data.evaluation.tasks import specs_of
from data.ranks import Ranks
from data.runs.implementation import Implementation
from data.runs.recorder import PROMPT, Recorder
from data.runs.schedule import bounds, rate, schedule
from data.runs.start import Start
from data.runs.stopping import stop_requests
from data.runs.together import in_turns
from data.text.loader import windows
from data.text.shards import read_meta


def train(start: Start, by: Implementation, files: Mapping[str, Any]) -> None:
    """Trains to the last step, or until asked to stop. `files` are JSON to keep in the run's folder, by name."""
    options, config, trainer, loader, ranks = start.options, start.config, by.trainer, start.loader, start.ranks
    start = replace(start, machines=machines(start, by))
    B, T = options.batch_size, options.seq_len
    tokens_a_step = options.grad_accum * B * T
    tokens, seconds = start.state["tokens"], start.state["seconds"]
    task_scores = scoring(start, by)  # before the run's folder is written to: a task may be refused
    recorder = Recorder(start, by, files)
    run = recorder.folder
    start.before.say(f"stopped before the first step; go on with\n  {recorder.resuming}")
    smoothed = Smoothed(row["loss"] for row in run.metrics[1:])
    say: Callable[[str], None] = (lambda text: None) if options.quiet else partial(print, flush=True)
    targets = read_meta(start.folder)["splits"]["valid"]["tokens"] - 1
    own_batches = range(ranks.rank, math.ceil(min(targets, options.eval_tokens or targets) / (B * T)), ranks.size)

    def validation_loss() -> float:
        """Each rank measures its batches; a loss of all ranks, and the same on all of them."""
        parts = windows(start.folder, "valid", B, T, options.eval_tokens or None, ranks.rank, ranks.size)
        own = by.evaluate(recorder.progress("validation loss", len(own_batches), "batch", iterable=parts))
        total, tokens = ranks.numbers(*own).sum(axis=0).tolist()
        return float(total / tokens)

    source = f"continuing after step {trainer.steps}" if options.resume else f"from {options.init}"
    computed = f"{by.device_name}, {options.dtype}" + (f", {by.kernels} kernels" if by.kernels else "")
    say(f"{options.preset or 'GPT-2'}, {parameter_count(config) / 1e6:.1f}M parameters, {source}; {computed}")
    say(f"data: {start.folder}, {loader.tokens:,} tokens; {options.steps} steps of {tokens_a_step:,}; run: {run.path}")
    if start.machines or options.global_batch_tokens:
        say(sharing(start))
    if "schedule" in start.changed or "steps" in start.changed:
        rises = bounds(schedule(options)[-1])[0] == trainer.steps > 0
        course = f"rises again to {options.lr:.1e}" if rises else "goes on as it was given (--rewarm raises it again)"
        say(f"other steps than before: {options.steps}; the learning rate {course}")
    if config.context < config.n_positions:
        say(f"note: positions from {config.context} on stay untrained, as --seq-len is below {config.n_positions}")
    if start.moments is None:
        started = time.perf_counter()
        with recorder.room_on_disk():
            row = {"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": validation_loss()}
            recorder.metrics(row | task_scores())
            recorder.sample()
            recorder.checkpoint(tokens, seconds)
        taken = f"{time.perf_counter() - started:.0f} s with compiling, a sample and a checkpoint"
        say(f"before training: validation loss {run.metrics[0]['val_loss']:.3f} ({taken})")
    val_loss = next(row["val_loss"] for row in reversed(run.metrics) if "val_loss" in row)

    compiling = 0 if files else min(1, by.compiling)  # where parity was checked, its graphs are compiled
    bar = Progress(
        total=options.steps,
        initial=trainer.steps,
        desc="training",
        unit="step",
        compiling=compiling,
        disable=options.quiet,
    )
    start.before.over()  # from here on a request ends after a step
    with stop_requests(ranks) as requests, bar, recorder.finished(), recorder.room_on_disk():

        def stop_request() -> int:
            """The signal with which any rank was asked to stop, or 0: on all ranks after the same step. Ends them all
            where one has found damaged data, or could not save.
            """
            said = ranks.numbers(*requests.caught[:1] or [0], start.verification.failed, recorder.failed)
            asked, damaged, unsaved = said.max(axis=0).astype(int).tolist()
            if damaged:
                start.verification.check_all()
            if unsaved:
                recorder.wait()
            if asked:
                requests.agreed()
            return int(asked)

        stop = stop_request()
        while trainer.steps < options.steps and not stop:
            started = time.perf_counter()
            lr = rate(options, trainer.steps, by.learning_rate)
            own, begin = loader.own(), loader.position
            batches = loader.next_micro_batches(start.micro_batches)
            loss, grad_norm = trainer.step(batches, lr)
            stop = stop_request()
            place = f"windows {begin} to {loader.position - 1} of the data"
            if not math.isfinite(loss + grad_norm):
                recorder.wait()  # the newest checkpoint is to be named
                where = windows_not_finite(ranks, own, trainer.finite(batches)) if ranks.size > 1 else place
                raise InputError(
                    f"the loss is {loss} and the gradient's norm {grad_norm} at step {trainer.steps + 1}, on {where}; "
                    f"the weights were left as they were, and {latest_checkpoint(run.path)} has those before; look at "
                    f"the data there, or begin again with `--config {quote(str(run.path))}` and an --lr below "
                    f"{options.lr}"
                )
            elapsed = time.perf_counter() - started
            tokens, seconds = tokens + tokens_a_step, seconds + elapsed
            speed = tokens_a_step / elapsed
            row = {"step": trainer.steps, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
            row |= {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}
            usual = smoothed.value
            if smoothed.add(loss):
                row["spike"] = True
                if ranks.rank == 0:
                    bar.line(f"step {trainer.steps}: the loss jumped from about {usual:.3f} to {loss:.3f}, on {place}")
            ends, lowest = trainer.steps in {options.steps, *run.ends}, False
            evaluates, samples = (ends or trainer.steps % n == 0 for n in (options.eval_every, options.sample_every))
            if evaluates:
                row["val_loss"] = val_loss = validation_loss()
                row |= task_scores()
                lowest = val_loss < min(r["val_loss"] for r in run.metrics if "val_loss" in r)
            recorder.metrics(row)
            peak = (by.peak_flops or 0) * ranks.size
            mfu = f", MFU {flops_a_token(config, T) * speed / peak:.1%}" if peak else ""
            figures = f"loss {loss:.3f} ({smoothed.value:.3f}), val {val_loss:.3f}, lr {lr:.1e}, {speed:,.0f} tok/s"
            bar.set_postfix_str(figures + mfu, refresh=False)
            bar.update()
            if samples:
                recorder.sample()
            if saves := ends or lowest or trainer.steps % options.save_every == 0:
                recorder.checkpoint(tokens, seconds)
            if evaluates or samples or saves:  # which may have taken long
                stop = stop_request()
        if trainer.steps > recorder.saved_step:  # a request to stop came
            recorder.checkpoint(tokens, seconds)
    recorder.close()

    if trainer.steps < options.steps:
        goes_on = f"stopped after step {trainer.steps}, which is saved; go on with\n  {recorder.resuming}"
        if ranks.rank == 0:
            print(goes_on, file=sys.stderr)
        sys.exit(128 + stop)
    if ranks.rank > 0:
        return
    for when, (step, text) in (("before training", run.samples[0]), (f"after {trainer.steps} steps", run.samples[-1])):
        say(f"\n--- {when} (step {step}) ---\n{text}")
    first, last = (f"{row['val_loss']:.3f}" for row in (run.metrics[0], run.metrics[-1]))
    say(f"\nValidation loss {first} -> {last}, {seconds:.0f} s of training. All of it is in {run.path}; try:")
    say(f"  {command('tinygrad_impl.generate', '--model', run.path, '--prompt', PROMPT)}")


class Smoothed:
    """The loss without its noise: an exponential mean of the last 50 or so. Tells what stands out of it."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.count, self._sum, self._deviation = 0, 0.0, 0.0
        for loss in losses:
            self.add(loss)

    @property
    def value(self) -> float:
        return self._sum / (1 - 0.98**self.count) if self.count else math.nan

    def add(self, loss: float) -> bool:
        """Whether this is a spike: as far above the mean as eight times the usual distance from it."""
        usual = self._deviation / (1 - 0.98**self.count) if self.count else math.inf
        spike = self.count >= 20 and loss - self.value > 8 * usual
        if self.count:
            self._deviation = 0.98 * self._deviation + 0.02 * abs(loss - self.value)
        self.count += 1
        self._sum = 0.98 * self._sum + 0.02 * loss
        return spike


def scoring(start: Start, by: Implementation) -> Callable[[], dict[str, float]]:
    """A function that scores the model as it is on --eval-tasks: columns for metrics.jsonl, the same on all ranks."""
    options = start.options
    if not options.eval_tasks:
        return dict
    if not options.quiet:
        print(f"loading the tasks {options.eval_tasks}", flush=True)
    from data.evaluation.harness import Tasks  # here, because it imports PyTorch, which takes long

    assert by.subject
    tasks, subject = in_turns(start.ranks, lambda: Tasks(specs_of(options.eval_tasks or ""))), by.subject

    def scores() -> dict[str, float]:
        results = tasks(
            replace(subject, ranks=start.ranks), options.eval_limit, stderr=False, part=True, disable=options.quiet
        )
        return columns(score_rows(results))

    return scores


def machines(start: Start, by: Implementation) -> dict[str, Any]:
    """What run.json says of several ranks, and of what they do together; nothing of a process that is alone."""
    options, ranks = start.options, start.ranks
    if ranks.size == 1:
        return {}
    hosts, cards = zip(*ranks.gather((socket.gethostname(), by.device_name)), strict=True)
    windows = options.grad_accum * options.batch_size
    batch = {"global_batch": windows, "global_batch_tokens": windows * options.seq_len}
    return {"ranks": {"world_size": ranks.size, "hosts": Counter(hosts), "cards": Counter(cards), **batch}}


def sharing(start: Start) -> str:
    """A line on the global batch, and on the ranks that share it."""
    windows, count = start.loader.world_size * start.loader.batch_size, start.micro_batches
    each = f"{count} micro-batch{'es' * (count > 1)} of {start.loader.batch_size // count}"
    batch = f"global batch: {windows:,} window{'s' * (windows > 1)}, {windows * start.options.seq_len:,} tokens"
    if not start.machines:
        return f"{batch}, in {each}"
    said = start.machines["ranks"]
    cards = ", ".join(f"{count} x {name}" for name, count in said["cards"].items())
    hosts = f"{len(said['hosts'])} host{'s' * (len(said['hosts']) > 1)}"
    return f"{said['world_size']} ranks on {hosts}: {cards}; {batch}, {start.loader.batch_size:,} a rank in {each}"


def windows_not_finite(ranks: Ranks, own: range, finite: bool) -> str:
    """Of which ranks the loss or gradient is not finite, by the windows of the data that each had; all where it is none
    of them, but their mean.
    """
    rows = ranks.numbers(own[0], own[-1], finite).astype(int).tolist()
    culprits = [(rank, first, last) for rank, (first, last, right) in enumerate(rows) if not right]
    if not culprits:
        return f"windows {rows[0][0]} to {rows[-1][1]} of the data, though finite on each rank alone"
    places = " and ".join(f"{first} to {last} (rank {rank})" for rank, first, last in culprits)
    return f"windows {places} of the data"
