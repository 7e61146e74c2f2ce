"""The windows of an update, which is the global batch, and how ranks share them: each takes as many, one after another
in micro-batches.
"""

import math

from data.cli import InputError, counted
from data.runs.options import Options


def micro_batch(share: int, most: int) -> int:
    """The most windows, but no more than `most`, that divide a rank's share into equal micro-batches."""
    return max(windows for windows in range(1, min(share, most) + 1) if share % windows == 0)


def accumulated(tokens: int, seq_len: int, batch_size: int, size: int) -> tuple[int, int]:
    """The micro-batches of an update of so many tokens on `size` ranks, over all of them, and the windows in each: at
    most `batch_size`. Raises `InputError` where the ranks cannot share such a batch equally.
    """
    windows, rest = divmod(tokens, seq_len)
    if rest or windows % size:
        step = seq_len * size
        below = tokens // step * step
        fitting = f"{below} or {below + step}" if below else f"{step}"
        why = (
            f"{counted(windows, 'window')} of --seq-len {seq_len}, which {size} ranks cannot share equally"
            if not rest
            else f"no multiple of --seq-len {seq_len}" + f", let alone for {size} ranks" * (size > 1)
        )
        raise InputError(f"--global-batch-tokens {tokens} is {why}; give {fitting}")
    each = micro_batch(windows // size, batch_size)
    return windows // each, each


def share_of_a_rank(options: Options, size: int) -> int:
    """The windows of an update that each of `size` ranks takes. Raises `InputError` where they cannot share equally."""
    windows = options.grad_accum * options.batch_size
    if windows % size == 0:
        return windows // size
    fewer, more = ([n for n in range(1, windows + 1) if windows % n == 0 and (n < size) == less] for less in (1, 0))
    ranks = " or ".join(map(str, [*fewer[-1:], *more[:1]]))
    wanted = f"start {ranks} rank{'s' * (ranks != '1')}"
    if not options.resume:
        step = size // math.gcd(options.batch_size, size)
        wanted += f", or give --grad-accum {math.ceil(options.grad_accum / step) * step}"
    raise InputError(
        f"{size} ranks cannot share equally the {counted(windows, 'window')} of an update (--grad-accum "
        f"{options.grad_accum} x --batch-size {options.batch_size}, over all ranks); {wanted}"
    )
