"""`python -m tinygrad_impl.tests.kill`: real training runs, killed at random moments and resumed, over and over.

Half of them are killed outright, the others asked to stop, by SIGTERM or as by a terminal that goes away (SIGHUP). Each
is begun for fewer steps than it is resumed for.

After every kill each checkpoint there is has to be whole, and `latest` has to name one, none older than before. And
every run has to end as the same run does that is left alone: with the same metrics and the same weights, bit for bit.
Half of the kills come at a random time, from the start on until the run that was left alone would end; the other half
while a checkpoint is being written. A quarter of the starts are two at once, of which one has to be refused.

Importing PyTorch would take most of the time. So the programs are forked from a process that has imported it, but for a
tenth of the starts, which are a user's: those are killed while they import, too.

With `--ranks N` each run is a job of N processes. A kill then hits one of them, which may also be stopped for ever, or
the launcher; and in the end no process may be left.
"""

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.checkpoints.checkpoint import latest_checkpoint
from data.checkpoints.sums import checkpoints, damage
from data.cli import ArgumentParser, Progress, integer, run
from data.runs.run_folder import read_metrics
from data.testing import save_model, write_stories
from data.text.prepare import prepare
from tinygrad_impl.tests import warm
from tinygrad_impl.tests.warm import Program

ROOT = Path(__file__).parents[2]
BEGUN, STEPS = 40, 60
OPTIONS = "--init init --data data --batch-size 2 --seq-len 16 --lr 0.01 --eval-tokens 32 --device CPU"
OPTIONS += f" --steps {BEGUN} --save-every 3 --keep 2 --eval-every 7 --sample-every 20 --quiet"
LONGEST = 600  # seconds that a process may take
# seconds after which a rank that is stopped is missed: longer than a package compiles, for which ranks wait
TIMEOUTS = {"tinygrad_impl": 120, "torch_ref": 20}
ENDING = 15  # seconds after that in which the job of a rank that is stopped has to end, on a machine that is not busy
ORPHANS = 20  # seconds in which ranks have to end whose launcher was killed
COLD = 0.1  # of the starts


@dataclass(frozen=True)
class Job:
    """What is killed: the program of a package, in so many processes, in a folder with a model and data."""

    folder: Path
    package: str
    ranks: int

    def start(self, run: Path, cold: bool = False) -> Program:
        """The run, from where it is."""
        options = [*OPTIONS.split(), "--out", str(run)]
        options += ["--parity", "off"] * (self.package == "tinygrad_impl")
        if (run / "run.json").exists():
            options = ["--resume", str(run), "--steps", str(STEPS), "--quiet"]
        if self.ranks > 1:
            options += ["--gpus", str(self.ranks), "--device", "CPU", "--timeout", str(TIMEOUTS[self.package])]
        _, said = tempfile.mkstemp(dir=self.folder, suffix=".err")
        return warm.start(self.package, options, self.folder, Path(said), cold)

    def ranks_of(self, launcher: Program) -> list[int]:
        """The processes that torchrun's launcher has started."""
        try:
            found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in found] if self.ranks > 1 else []


def start_twice(job: Job, run: Path, cold: bool, faults: list[str]) -> Program:
    """The one of two that has the run; the other has to have been refused."""
    both, began = [job.start(run, cold), job.start(run, cold)], time.monotonic()
    while all(process.poll() is None for process in both) and time.monotonic() - began < LONGEST:
        time.sleep(0.005)
    refused, having = sorted(both, key=lambda process: process.poll() is None)
    if refused.poll() == 0:  # it had the run, and so little to do that it is done before the other has looked
        refused, having = having, refused
        refused.process.join(LONGEST)
    said = refused.errors() if refused.poll() is not None else "both have it"
    if refused.poll() != 2 or not any(words in said for words in (" is in use by ", " holds a run;", " is finished,")):
        faults.append(f"{run.name}: two at once: exit code {refused.poll()}: {said[-300:]}")
        refused.process.kill()
    return having


def command_of(pid: int) -> bytes:
    """A process's command line; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def hit(job: Job, process: Program, chance: random.Random, faults: list[str]) -> str:
    """Kills the run, or stops or kills one of its ranks, and waits for its end. Returns what it did."""
    ranks = job.ranks_of(process)
    if ranks and chance.random() < 0.75:
        number = chance.randrange(len(ranks))
        kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
        with suppress(ProcessLookupError):
            os.kill(ranks[number], kind)
        done = f"{kind.name} to rank {number}"
    else:
        kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
        os.kill(process.pid, kind)
        done = f"{kind.name}"
    try:
        process.wait(LONGEST)
    except TimeoutError as e:
        faults.append(f"{done}: {e}")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(LONGEST)
    until = time.monotonic() + ORPHANS
    while any(map(command_of, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    if left := [pid for pid in ranks if command_of(pid)]:
        faults.append(f"{done}: left {left}")
    return done


def ended(run: Path) -> tuple[list[dict[str, Any]], str]:
    """What a run has to have in common with one that was left alone."""
    times = ("seconds", "tokens_per_second")
    course = [{k: v for k, v in row.items() if k not in times} for row in read_metrics(run)]
    sha256 = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors"):
        sha256.update((latest_checkpoint(run) / name).read_bytes())
    return course, sha256.hexdigest()


def torture(
    job: Job,
    run: Path,
    expected: tuple[list[dict[str, Any]], str],
    kills: int,
    seed: int,
    longest: float,
    progress: Progress,
) -> dict[str, Any]:
    """Kills the run `kills` times, then lets it end. One that ends before is followed by another. Half of the kills
    come at a random time, at most `longest` seconds after the start.
    """
    chance = random.Random(seed)
    done, saving, runs, faults = 0, 0, 0, list[str]()
    newest, out, hits = -1, run, Counter[str]()
    while True:
        cold, began = chance.random() < COLD, time.monotonic()
        process = job.start(out, cold) if chance.random() < 0.75 else start_twice(job, out, cold, faults)
        if done == kills:
            pass
        elif chance.random() < 0.5:
            delay = chance.uniform(0, longest)
            while process.poll() is None and time.monotonic() - began < delay:
                time.sleep(0.005)
        else:
            saves, seen, partial = chance.randint(1, 8), 0, False
            while process.poll() is None and seen < saves and time.monotonic() - began < LONGEST:
                there = any(out.glob("checkpoints/*.partial"))
                seen, partial = seen + (there and not partial), there
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.04))
        if done == kills:
            process.wait(LONGEST)
        if process.poll() is None:
            saving += any(out.glob("checkpoints/*.partial"))
            hits[hit(job, process, chance, faults)] += 1
            done += 1
            progress.update()
            faults += [
                f"{out.name}: {fault.words}" for path in checkpoints(out / "checkpoints") if (fault := damage(path))
            ]
            if (out / "checkpoints" / "latest").exists():
                step = int(latest_checkpoint(out).name.removeprefix("step-"))
                if step < newest:
                    faults.append(f"{out.name}: from step {newest} back to {step}")
                newest = step
            elif newest >= 0:
                faults.append(f"{out.name}: the newest checkpoint is lost")
            continue
        if process.poll() and not (process.poll() == 2 and "is finished, with all its" in process.errors()):
            faults.append(f"{out.name}: exit code {process.poll()}: {process.errors()[-300:]}")
            break  # it may also have been killed after its last checkpoint, and so find nothing left to do
        if int(latest_checkpoint(out).name.removeprefix("step-")) < STEPS:
            continue
        runs += 1
        if ended(out) != expected:
            faults.append(f"{out.name}: ended otherwise than the run that was left alone")
        if done == kills:
            break
        newest, out = -1, run.with_name(f"{run.name}-{runs}")
    return {"kills": done, "while saving": saving, "runs finished": runs, "hits": hits, "faults": faults}


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.tests.kill",
        description="Kill training runs at random moments, resume them, and see whether anything is lost.",
        epilog="example: python -m tinygrad_impl.tests.kill --kills 200",
    )
    parser.add_argument("--kills", type=integer(1), default=20, metavar="N", help="in all (20)")
    parser.add_argument("--jobs", type=integer(1), default=os.cpu_count() or 1, metavar="N", help="runs at a time")
    parser.add_argument("--package", choices=TIMEOUTS, default="tinygrad_impl", help="whose program (tinygrad_impl)")
    parser.add_argument("--ranks", type=integer(1), default=1, metavar="N", help="processes of a run (1)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the moments")
    args = parser.parse_args()
    jobs = min(args.jobs, args.kills)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        job = Job(folder, args.package, args.ranks)
        save_model(folder / "init")
        prepare(str(write_stories(folder / "stories.txt")), folder / "data")
        for _ in (BEGUN, STEPS):
            began = time.monotonic()
            alone = job.start(folder / "alone")
            alone.wait(LONGEST)
            assert alone.poll() == 0, alone.errors()
            longest = time.monotonic() - began
        expected = ended(folder / "alone")
        with Progress(total=args.kills, desc="kills", unit="kill") as progress, ThreadPoolExecutor(jobs) as pool:
            shares = [args.kills // jobs + (i < args.kills % jobs) for i in range(jobs)]
            results = list(
                pool.map(
                    lambda i: torture(
                        job, folder / f"run{i}", expected, shares[i], args.seed * 1000 + i, longest, progress
                    ),
                    range(jobs),
                )
            )
    faults = [fault for result in results for fault in result["faults"]]
    kills, saving, ended_runs = (sum(r[name] for r in results) for name in ("kills", "while saving", "runs finished"))
    hits = sum((result["hits"] for result in results), Counter[str]())
    print(*(f"{count} x {what}" for what, count in hits.most_common()), sep=", ")
    print(*faults, sep="\n", end="\n" * bool(faults))
    print(
        f"{kills} kills, {saving} while a checkpoint was being written; {ended_runs} runs ended; {len(faults)} faults"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    run(main)
