"""`python -m torch_ref.train`: trains the reference, with the options, loop and files of tinygrad_impl.train."""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch

from data.cli import InputError, counted, run
from data.gpu import numbered, show_one_gpu
from data.launch import note_idle_gpus, place_process
from data.ranks import joined
from data.runs.find_lr import find_learning_rate
from data.runs.implementation import Implementation
from data.runs.loop import train
from data.runs.options import parse, parser
from data.runs.start import Start, begin
from data.text.sampling import Sampler
from torch_ref.evaluate import subject_of
from torch_ref.generate import generate
from torch_ref.trainer import Trainer, learning_rate


def main() -> None:
    given = parse(parser("python -m torch_ref.train", "PyTorch"), sys.argv[1:])
    wanted = place_process("torch_ref.train", sys.argv[1:], given)
    device, number = ("CUDA" if torch.cuda.is_available() else "CPU", None) if wanted is None else numbered(wanted)
    if number is not None:
        show_one_gpu(number)
    if device not in ("CPU", "CUDA") or (device == "CUDA" and not torch.cuda.is_available()):
        raise InputError(f"PyTorch has no device {wanted!r} here; leave --device out for the best there is")
    note_idle_gpus(given, device)
    with joined(device, given.get("timeout", 600)) as ranks, begin(given, device, ranks) as start:
        if ranks.size > 1 and device == "CPU":
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # torchrun has it begin with one
        train_from(start, device)


def train_from(start: Start, device: str) -> None:
    options, tokenizer = start.options, start.tokenizer
    trainer = Trainer(
        start.config,
        start.arrays,
        betas=options.betas,
        weight_decay=options.weight_decay,
        clip=options.clip,
        autocast=torch.bfloat16 if options.dtype == "bfloat16" else None,
        device=device.lower(),
        ranks=start.ranks,
        zero=options.zero != 0,
        reduce_dtype=options.reduce_dtype or "float32",
    )
    if start.moments:
        trainer.restore(start.arrays, start.moments, start.state["step"])

    def continued(prompt: str, tokens: int, sampler: Sampler, tick: Callable[[], object]) -> str:
        ids = tokenizer.encode(prompt) or [tokenizer.eot]
        [new] = generate(trainer.model, [ids], tokens, sampler, tokenizer.vocab_size, tokenizer.eot, tick=tick)
        following = tokenizer.incremental(ids)
        return prompt + "".join(map(following, [*new, None]))

    def moments(keep: bool) -> dict[str, np.ndarray]:
        found = trainer.moments(keep)
        return {name: t.cpu().numpy().copy() for name, t in found.items()}  # copies, for AdamW goes on

    threads = f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    pytorch = Implementation(
        package="torch_ref",
        trainer=trainer,
        arrays=trainer.arrays,
        moments=moments,
        learning_rate=learning_rate,
        evaluate=trainer.evaluate,
        continue_text=continued,
        device=device,
        device_name=torch.cuda.get_device_name() if device == "CUDA" else threads,
        subject=subject_of(trainer.model, tokenizer, device, trainer.autocast),
    )
    if options.find_lr:
        find_learning_rate(start, pytorch)
    else:
        train(start, pytorch, files={})


if __name__ == "__main__":
    run(main)
