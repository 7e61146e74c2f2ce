"""What the gate compares where several ranks train one model: the mean over ranks of their gradients, and AdamW's steps
from it. PyTorch computes the same in every process by itself, from the micro-batches of all ranks, so that nothing of
what is under test is in what it is compared with; each rank's result is judged, and the worst of them counts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import torch_ref.trainer
from data.ranks import Ranks
from data.runs.start import Start
from data.text.loader import Loader
from parity_tests.blame import described
from parity_tests.bounds import KEYS, ONE_NUMBER, Comparison, Row, Tensors, summation_excuses, worst
from parity_tests.checks import (
    beginnings,
    draws,
    global_norm,
    gradient_rows,
    loss_error,
    results,
    step_rows,
)
from parity_tests.setting import Batch, References, Setting
from tinygrad_impl.trainer import Trainer

SENT = 2.0**-8  # of bfloat16, in which gradients may be sent: relative, half a unit in the last place
NEVER = 1e9  # a norm that clips nothing
MOVED = 0.05  # how far weights are moved between comparisons, over the token table's RMS: further than bfloat16 rounds

Shares = Sequence[Sequence[Batch]]  # the micro-batches of each rank


def averaged_rows(
    setting: Setting,
    port: Trainer,
    references: References,
    groups: Iterable[Sequence[Batch]],
    ranks: Ranks,
    nudges: int = 0,
) -> list[Row]:
    """As `checks.gradient_rows`, of groups of this rank's micro-batches: the means over all ranks. All ranks call this.

    After each group the port takes AdamW's step from what it has averaged. The norm that the step reports is compared
    too, and PyTorch goes on from the weights that the port says it has: in the next group's gradients shows whether
    these are the weights that all ranks' graphs read.
    """
    reference, own = references
    comparison = Comparison("gradient", setting.dtype, nudged=nudges > 0)
    sent = Sent(ranks.size)
    table = port.arrays()["wte.weight"]
    lr = MOVED * math.sqrt(np.square(table, dtype=np.float64).mean())
    for batches in groups:
        starts, shares = beginnings(own, nudges), ranks.gather(batches)
        whole = [batch for share in shares for batch in share]
        port.accumulate(batches)
        _, norm = port.update(lr)  # before anything else: `mean_gradients` may do what `update` forgets
        loss, gradients = port.mean_gradients()
        ours = {**gradients, "loss": np.array(loss), "norm": np.array(norm)}
        expected = sent.mean(results(reference, setting.reference_batches(share)) for share in shares)
        comparison.add(with_norm(expected), ours, *map(with_norm, draws(own, starts, whole)))
        arrays = port.arrays()
        for trainer in references:
            trainer.restore(arrays, trainer.moments(), trainer.steps)
    x, _ = batches[0]
    tallies = [tally for name, tally in comparison.tallies.items() if name not in ("loss", "norm")]
    # a norm's relative error is at most that of the vector
    of_all = math.sqrt(sum(t.own for t in tallies) / sum(t.reference for t in tallies)) if tallies else 0.0
    excuses = summation_excuses(setting.config, x.size) | {"norm": (of_all, ONE_NUMBER)}
    rows = comparison.rows(excuses | {"loss": (loss_error(references, batches[0]), ONE_NUMBER)})
    return sent.excused(rows) if port.exchange.dtype == "bfloat16" else rows


def with_norm(found: Tensors) -> Tensors:
    return {**found, "norm": np.array(global_norm({name: g for name, g in found.items() if name != "loss"}))}


class Sent:
    """What rounding gradients to bfloat16 may do to their mean over `size` ranks.

    Each of the N contributions to an element is rounded when it is sent, is divided by N (which rounds unless N is a
    power of two), and takes part in at most N - 1 additions, each of which rounds where sums are bfloat16 too. An
    element that is the mean of g_r is then off by at most ((1 + u)^(N + 1) - 1) times the mean of |g_r|, u being 2^-8
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1 and 4.2); and a tensor, in the 2-norm, by at most that
    times the mean of the ranks' norms.
    """

    def __init__(self, size: int):
        self.size, self.factor = size, (1 + SENT) ** (size + 1) - 1
        self.contributions: dict[str, float] = {}  # squares of means over ranks of norms, summed over groups
        self.means: dict[str, float] = {}  # squares of norms of means over ranks

    def mean(self, shares: Iterable[Tensors]) -> Tensors:
        """The mean of the ranks' results, whose norms are noted."""
        total: dict[str, Any] = {}
        norms = dict[str, float]()
        for share in shares:
            for name, value in share.items():
                total[name] = total[name] + value if name in total else value
                norms[name] = norms.get(name, 0.0) + float(torch.as_tensor(value).norm())
        means = {name: value / self.size for name, value in total.items()}
        for name, value in means.items():
            self.contributions[name] = self.contributions.get(name, 0.0) + (norms[name] / self.size) ** 2
            self.means[name] = self.means.get(name, 0.0) + float(torch.as_tensor(value).square().sum())
        return means

    def excused(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, where those that failed may be off by this much more."""
        gradients = self.means.keys() - {"loss"}
        contributions, means = (
            of | {"norm": sum(of[name] for name in gradients)} for of in (self.contributions, self.means)
        )
        for row in rows:
            name = row.name.removesuffix(KEYS)
            if not row.passed and name != "loss" and means.get(name):
                row.allowed += self.factor * math.sqrt(contributions[name] / means[name])
                row.reason = "the ranks send their gradients as bfloat16"
        return list(rows)


def agreed(ranks: Ranks, rows: Sequence[Row]) -> list[Row]:
    """Every row as it is on the rank where it is worst; the same on all ranks."""
    by_rank = [{(row.check, row.name): row for row in found} for found in ranks.gather(list(rows))]
    names = dict.fromkeys(name for found in by_rank for name in found)
    return [worst([found[name] for found in by_rank if name in found]) for name in names]


def wrong_windows(start: Start) -> str | None:
    """Whose windows of the first update are not those that one process would give it, or None. All ranks call this, and
    their loaders are left as they were.
    """
    options, loader, position = start.options, start.loader, start.loader.state()
    by_rank = start.ranks.gather(loader.next_batch()[0])
    loader.restore(position)
    alone = Loader(start.folder, "train", sum(map(len, by_rank)), options.seq_len, options.seed)
    alone.restore(position)
    expected = np.split(alone.next_batch()[0], len(by_rank))
    wrong = [rank for rank, x in enumerate(by_rank) if not np.array_equal(x, expected[rank])]
    return f"the data of rank {wrong[0]}: not its part of the windows that one process would read" if wrong else None


def culprit_of_ranks(
    setting: Setting, port: Trainer, failed: Sequence[Row], shares: Shares, ranks: Ranks, **asked: Any
) -> str | None:
    """What the ranks do wrong together, or None if one of them is wrong by itself. All ranks call this, with the rows
    that failed (`agreed`) and the ranks' micro-batches of one update, from which the port begins.
    """
    share = shares[ranks.rank]
    alone, references = setting.trainer(**asked), setting.references(**asked)
    rows = gradient_rows(setting, alone, references, [share])
    if any(row.check == "training" for row in failed):
        rows += step_rows(setting, alone, references, [(share[:1], 1e-3, 1e-3)])
    if not all(row.passed for row in agreed(ranks, rows)):
        return None
    words = f"by itself each of the {ranks.size} ranks is right; {described(worst(failed))}"
    gradients = {row.name for row in failed if row.check == "gradient"}
    if gradients - {"loss", "norm"}:
        return f"{mistaken_average(port, setting.references(**asked)[0], shares, ranks)}: {words}"
    if gradients == {"loss"}:
        return f"the loss, which is not the average over ranks: {words}"
    if gradients:
        port.clip = NEVER  # the norm takes no part then
        unclipped = setting.references(**asked | {"clip": NEVER})
        rows = agreed(ranks, step_rows(setting, port, unclipped, [(shares[0][:1], 1e-3, 1e-3)]))
        if all(row.passed for row in rows if row.name != "norm"):
            return f"the norm, which is not that of the average over ranks: {words}"
    return f"AdamW's step, which the ranks share out: {words}"


def mistaken_average(port: Trainer, reference: torch_ref.trainer.Trainer, shares: Shares, ranks: Ranks) -> str:
    """What the port has in place of the mean over ranks of their gradients. Where each rank has a part of the
    gradients, it may have some rank's in one part, and another's in another.
    """

    def flat(gradients: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat([torch.as_tensor(gradients[name]).double().flatten().cpu() for name in reference.parameters])

    def of(batches: Sequence[Batch]) -> torch.Tensor:
        reference.accumulate(batches)
        return flat(reference.mean_gradients()[1])

    def mean(i: slice) -> torch.Tensor:
        return torch.stack([of(share[i]) for share in shares]).mean(0)

    def to_the_nearest(guesses: Iterable[torch.Tensor]) -> float:
        return float(torch.stack([(found - guess).abs() for guess in guesses]).amin(0).norm())

    port.accumulate(shares[ranks.rank])
    found, right, count = flat(port.mean_gradients()[1]), mean(slice(None)), len(shares[0])
    distances = {
        "the gradients, which are not averaged over ranks": to_the_nearest(of(share) for share in shares),
        "the gradients, which are the sum over ranks and not the mean": to_the_nearest([right * ranks.size]),
        "the weights, of which ranks do not have the same after a step": to_the_nearest([right]),
    }
    for which, i in (("first", slice(1)), ("last", slice(-1, None))) if count > 1 else ():
        of_one = mean(i)
        distances[f"the gradients, of which only the {which} micro-batch's are averaged over ranks"] = to_the_nearest(
            of(share) + (of_one - of(share[i])) / count for share in shares
        )
    of_all_ranks = ranks.numbers(*distances.values()).max(0)
    # other roundings make differences that are far below those of these mistakes
    if of_all_ranks.min() > 0.01 * float(right.norm()):
        return "the average over ranks"
    return list(distances)[int(of_all_ranks.argmin())]
