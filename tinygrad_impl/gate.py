"""The parity gate: training asks whether its own graphs compute what PyTorch does. Here alone it needs PyTorch."""

import time
from collections.abc import Callable
from typing import Any

import torch

from data.cli import InputError
from data.config import GPT2Config
from parity_tests.proof import (
    BATCHES,
    GRAPH_BATCHES,
    MORE,
    MOVED,
    NUDGES,
    Batch,
    Setting,
    Step,
    by_luck,
    certificate,
    gradient_rows,
    micro_batches,
    named,
    step_rows,
)
from tinygrad_impl.trainer import Trainer


def prove_graphs(
    trainer: Trainer, config: GPT2Config, next_batch: Callable[[], Batch], lr: float, dtype: str, device: str
) -> dict[str, Any]:
    """Compares the trainer's gradients and AdamW steps, on the batches that come, with PyTorch's. Leaves the trainer as
    it was. Each of its compiled graphs is run plainly, captured and then replayed, as it is in training.

    Returns the certificate, with a line for people as "summary". Raises `InputError`, naming the part that is wrong.
    """
    started = time.perf_counter()
    arrays, moments, steps = trainer.model.arrays(), trainer.moments(), trainer.steps
    setting = Setting(config, arrays, dtype, device, trainer.kernels)
    references = setting.references(
        betas=trainer.betas, eps=trainer.eps, weight_decay=trainer.weight_decay, clip=trainer.clip
    )
    for times in (1, MORE):
        batches = [next_batch() for _ in range(times * GRAPH_BATCHES)]
        training_steps: list[Step] = [([batch], lr, lr) for batch in batches[:3]]
        training = step_rows(setting, trainer, references, training_steps)
        nudges = NUDGES if times > 1 else 0
        gradients = gradient_rows(setting, trainer, references, micro_batches(batches), nudges)
        rows = gradients + training
        trainer.restore(arrays, moments, steps)
        failed = [row for row in rows if not row.passed]
        if not (failed and by_luck(failed, dtype)):
            break
    del references
    torch.cuda.empty_cache()  # training has all of the memory

    if failed:
        few = [(x[:2], y[:2]) for x, y in batches[:BATCHES]]  # a sub-layer that is wrong is wrong in two rows
        name = named(setting, failed, few, len(few))
        raise InputError(
            f"parity: tinygrad on {device} in {dtype} does not compute what PyTorch does: {name}; nothing was trained "
            "(`python -m parity_tests` shows more, --parity off trains all the same)"
        )
    ratio = max((row.ratio for row in gradients if row.ratio and row.reason in ("", MOVED)), default=0.0)
    seconds = time.perf_counter() - started
    count = len(trainer.parameters)
    summary = f"parity: {count} gradients within {ratio:.1f}x of torch's own {dtype} error ({seconds:.0f} s)"
    B, T = batches[0][0].shape
    more = {"device": device, "batch_size": B, "seq_len": T, "seconds": round(seconds, 1), "summary": summary}
    return certificate(setting, rows, None, **more)
