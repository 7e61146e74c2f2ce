"""--find-lr: tries learning rates and proposes one."""

import json
import math

import numpy as np

from data.cli import InputError, Progress
from data.files import atomic_write
from data.runs.implementation import Implementation
from data.runs.plots import plot_learning_rates
from data.runs.start import Start

STEPS = 100  # one for each rate


def find_learning_rate(start: Start, by: Implementation) -> None:
    """The range test of Smith 2015 (arXiv 1506.01186, section 3.3): the rate grows from step to step, until the loss
    does too. Proposed is the rate at which the smoothed loss falls fastest. Writes find-lr.png and find-lr.json.
    """
    options = start.options
    out = options.out
    assert out  # `begin` has it
    rates, losses, means = np.geomspace(1e-6, 1, STEPS).tolist(), list[float](), list[float]()
    mean = 0.0
    with Progress(
        total=STEPS, desc="find-lr", unit="step", compiling=min(1, by.compiling), disable=options.quiet
    ) as progress:
        for i, lr in enumerate(rates, 1):
            loss, _ = by.trainer.step(start.loader.next_micro_batches(start.micro_batches), lr)
            if not math.isfinite(loss):
                if not losses:
                    raise InputError(
                        f"the first loss, from the weights as they are, is {loss}: no learning rate mends that; look "
                        "at the data, and at the weights of --init"
                    )
                break
            mean = 0.9 * mean + 0.1 * loss
            losses.append(loss)
            means.append(mean / (1 - 0.9**i))
            progress.set_postfix_str(f"lr {lr:.1e}, loss {loss:.3f}", refresh=False)
            progress.update()
            if means[-1] > 1.5 * min(means):
                break
    lowest = int(np.argmin(means))
    if lowest < 4:
        raise InputError("the loss does not fall at any learning rate tried; look at the data and the weights")
    if start.ranks.rank > 0:
        return
    slopes = np.gradient(np.array(means[: lowest + 1]))  # the rates are evenly spaced in their logarithm
    proposed = float(f"{rates[int(np.argmin(slopes))]:.1e}")
    tried = rates[: len(losses)]
    plot_learning_rates(out / "find-lr.png", tried, losses, means, proposed)
    found = {"proposed": proposed, "lr": tried, "loss": losses, "smoothed": means, "options": options.recorded()}
    with atomic_write(out / "find-lr.json", "w") as f:
        f.write(json.dumps(found, indent=1) + "\n")
    print(f"the loss falls fastest at a learning rate of {proposed:.1e}, and is lowest at {rates[lowest]:.1e}: {out}")
    print(f"  to train with it, give --lr {proposed:.1e} in place of --find-lr, and a new --out if one was given")
