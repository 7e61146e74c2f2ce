"""The parity gate: before tinygrad trains, the graphs that it trains with are compared with PyTorch."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.optim would import it at its first use; imported here, it loads while tinygrad compiles

from data.cli import InputError, Progress
from data.ranks import attempt
from data.runs.run_folder import read_sealed
from data.runs.start import Start
from parity_tests.averaging import agreed, averaged_rows, culprit_of_ranks, wrong_windows
from parity_tests.blame import find_culprit
from parity_tests.bounds import NUDGED, near_miss
from parity_tests.certificate import certificate, programs
from parity_tests.checks import Step, gradient_rows, not_finite_rows, now, step_rows
from parity_tests.proof import BATCHES, GRAPH_BATCHES, MORE
from parity_tests.setting import NUDGES, Batch, References, Setting
from tinygrad_impl.backend import Backend
from tinygrad_impl.trainer import Trainer

EPS = 1e-8  # of AdamW: there is no option for it


def ready_references(start: Start, device: str, backend: Backend) -> tuple[Setting, list[References]]:
    """What is compared, and a list of one pair: PyTorch's trainers with the options and weights of `start`.

    On a GPU they have computed gradients once, because PyTorch loads its kernels when it first needs them.
    """
    args = start.options
    setting = Setting(start.config, start.arrays, args.dtype, device, backend)
    references = setting.references(**asked_for(start))
    if setting.torch_device == "cuda":
        row = np.zeros((1, args.seq_len), np.int32)
        for trainer in references:
            trainer.accumulate([(row, row)])
    return setting, [references]


def asked_for(start: Start) -> dict[str, Any]:
    """The options of AdamW as the user gave them, by the names of the trainers' arguments."""
    args = start.options
    return {"betas": tuple(args.betas), "eps": EPS, "weight_decay": args.weight_decay, "clip": args.clip}


def prove_graphs(
    trainer: Trainer, start: Start, device: str, began: float, setting: Setting, made: list[References]
) -> dict[str, Any]:
    """Compares the trainer's gradients and AdamW steps, on the batches that it is about to see, with those of PyTorch.

    PyTorch has the options and weights of `start`, which are what the user asked for, and not those that the trainer
    was made with. `setting` and `made` are what `ready_references` gave; the list is emptied, so that nothing keeps its
    trainers in memory after this. Each of the trainer's compiled graphs is captured and then replayed, as in training.
    Trainer and loader are left as they were.

    With several ranks all of them call this, and have the same verdict: what is compared is what the ranks' graphs and
    their averaging come to (averaging.py).

    Where torchrun has started the ranks again, the certificate that they had before holds if it is of these programs
    and batches, so that only what they begin with is compared.

    `began`: when capturing the graphs began, by `time.perf_counter`. The certificate has the seconds since then.

    Returns the certificate, in which "summary" is a line for people, and "batches" how many micro-batches' gradients
    were compared. Raises `InputError`, naming the part that is wrong.
    """
    args, position, ranks = start.options, start.loader.state(), start.ranks
    references, asked = made.pop(), asked_for(start)
    steps, moments = start.state["step"], start.moments
    if moments is None:
        zeros = {name: np.zeros_like(array) for name, array in start.arrays.items()}
        moments = {f"{moment}.{name}": zero for moment in ("exp_avg", "exp_avg_sq") for name, zero in zeros.items()}
    wrong = [difference(trainer, start.arrays | moments, steps, asked), wrong_windows(start)]
    if wrongs := [words for found in ranks.gather(wrong) for words in found if words]:
        raise refusal(args.dtype, device, wrongs[0])
    if before := ranks.broadcast(certificate_before(start, device) if attempt() else None):
        del references
        torch.cuda.empty_cache()
        return before
    # the first step compiles AdamW; on several ranks, where no gradients were computed before, so does the first group
    compiling = 1 if ranks.size == 1 else 4
    for times in (1, MORE):
        groups, taken = user_steps(start, times * GRAPH_BATCHES)
        bar = Progress(
            total=len(taken) + len(groups),
            desc="parity" if times == 1 else "parity again, with more",
            unit="pass",
            compiling=compiling if times == 1 else 0,
            disable=args.quiet or ranks.rank > 0,
        )
        # a gradient as it is, one twice as large as clipping lets it be, and one that it leaves alone
        norms = [None, 2 * args.clip, args.clip / 2]
        nudges = NUDGES if times > 1 else 0
        with bar:
            training = agreed(ranks, step_rows(setting, trainer, references, counted(taken, bar), norms))
            if all(row.passed for row in training):  # ranks of different norms would disagree about what is finite
                training += not_finite_rows(trainer)
            if ranks.size == 1:
                gradients = gradient_rows(setting, trainer, references, counted(groups, bar), nudges)
            else:
                gradients = averaged_rows(setting, trainer, references, counted(groups, bar), ranks, nudges)
        rows = agreed(ranks, gradients + training)
        trainer.restore(start.arrays, moments, steps)
        failed = [row for row in rows if not row.passed]
        if not (failed and near_miss(failed, args.dtype)):
            break
    start.loader.restore(position)
    del references
    torch.cuda.empty_cache()  # training has all of the memory

    if failed:
        shares = ranks.gather(groups[0])
        name = culprit_of_ranks(setting, trainer, failed, shares, ranks, **asked) if ranks.size > 1 else None
        if name is None:
            batches = [batch for group in groups for batch in group][:BATCHES]
            few_rows = [(x[:2], y[:2]) for x, y in batches]  # a sub-layer that is wrong is wrong in two rows
            name = find_culprit(setting, failed, few_rows, len(few_rows), **asked)
        raise refusal(args.dtype, device, ranks.broadcast(name))
    compared = [row.ratio for row in rows if row.check == "gradient" and row.ratio and row.reason in ("", NUDGED)]
    ratio = max(compared, default=0.0)
    seconds = time.perf_counter() - began
    count = len(trainer.parameters)
    over = f", averaged over {ranks.size} ranks," if ranks.size > 1 else ""
    summary = f"parity: {count} gradients{over} within {ratio:.1f}x of torch's own {args.dtype} error ({seconds:.0f} s)"
    more = circumstances(start, device) | {"batches": ranks.size * sum(map(len, groups))}
    return certificate(setting, rows, None, **more, seconds=round(seconds, 1), summary=summary)


def circumstances(start: Start, device: str) -> dict[str, Any]:
    """What is compared, but for the weights."""
    args, ranks = start.options, start.ranks
    found = {"device": device, "batch_size": args.batch_size, "seq_len": args.seq_len, "grad_accum": args.grad_accum}
    return found | ({"ranks": ranks.size} if ranks.size > 1 else {})


def certificate_before(start: Start, device: str) -> dict[str, Any] | None:
    """The certificate in the run's folder, if it says that what is now to be trained was proven equal."""
    assert start.options.out
    file = start.options.out / "parity.json"
    if start.state["step"] == 0 or not file.is_file():
        return None
    found = read_sealed(file)
    same = {"verdict": "equal", "dtype": start.options.dtype} | programs() | circumstances(start, device)
    if any(found.get(name) != value for name, value in same.items()):
        return None
    if not start.options.quiet:
        print(f"parity: proven before the ranks were started again ({file})", flush=True)
    return found


def counted(items: Iterable[Any], bar: Progress) -> Iterator[Any]:
    """The items, each of which is counted when it is done."""
    for item in items:
        yield item
        bar.update()


def user_steps(start: Start, count: int) -> tuple[list[list[Batch]], list[Step]]:
    """Of the loader's next micro-batches, groups whose gradients to compare, and AdamW's steps of three kinds.

    The groups: as many as a step takes, then one, then two if a step takes more than one (otherwise nothing that trains
    adds gradients to others), then single ones until there are `count` in all. With several ranks, this rank's: all as
    many as its step takes, at least twice, so that what is captured is replayed.

    The steps, the same on all ranks: from as many micro-batches as a rank's step takes, from one and from two.
    """
    args, ranks = start.options, start.ranks
    accumulated = start.micro_batches
    if ranks.size == 1:
        sizes = [accumulated, 1, min(2, accumulated)]
        sizes += [1] * max(0, count - sum(sizes))
    else:
        sizes = [accumulated] * max(2, count // (accumulated * ranks.size))

    def micro_batches() -> Iterator[Batch]:
        while True:
            yield from start.loader.next_micro_batches(accumulated)

    endless = micro_batches()
    groups = [list(islice(endless, size)) for size in sizes]
    of_all = iter([batch for group in groups for share in ranks.gather(group) for batch in share])
    kinds = zip((accumulated, 1, 2), (args.lr, args.lr / 2, args.lr), strict=True)
    return groups, [(list(islice(of_all, size)), rate, rate) for size, rate in kinds]


def difference(trainer: Trainer, state: dict[str, np.ndarray], steps: int, asked: dict[str, Any]) -> str | None:
    """The first option, step, weight or moment in which the trainer is not what was asked for, or None."""
    ours = now(trainer)  # before anything is returned: all ranks take part in gathering it
    for name, value in (asked | {"steps": steps}).items():
        if getattr(trainer, name) != value:
            return f"{name}: it has {getattr(trainer, name)}, and was asked for {value}"
    for name, array in state.items():
        if not torch.equal(ours[name], torch.as_tensor(array).to(ours[name].device)):
            return f"{name}: it does not begin with those it was given"
    return None


def refusal(dtype: str, device: str, name: str) -> InputError:
    return InputError(
        f"parity: tinygrad on {device} in {dtype} does not compute what PyTorch does: {name}; nothing was trained "
        "(`python -m parity_tests` shows more, --parity off trains all the same)"
    )
