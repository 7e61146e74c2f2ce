"""`python -m tinygrad_impl.train`: trains GPT-2, from random weights or from given ones, on any text."""

import importlib.util
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tinygrad.helpers import DEV

import data.runs.options
from data.cli import ArgumentParser, InputError, run
from data.evaluation.subject import Subject, batch_tokens
from data.launch import note_idle_gpus, place_process
from data.ranks import joined
from data.runs.find_lr import find_learning_rate
from data.runs.implementation import Implementation
from data.runs.loop import train
from data.runs.options import Given, parse
from data.runs.start import Start, begin
from data.text.sampling import Sampler
from tinygrad_impl.backend import CHOICES, Plain, choose
from tinygrad_impl.compilers import none_begins
from tinygrad_impl.device import device_name, open_device, peak_flops
from tinygrad_impl.generate import COMPILING, Generator, continue_texts
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.trainer import Trainer, learning_rate


def parser() -> ArgumentParser:
    parser = data.runs.options.parser("python -m tinygrad_impl.train", "tinygrad")
    parser.add_argument("--parity", choices=("on", "off"), help="compare with PyTorch before training (on)")
    parser.add_argument(
        "--kernels", choices=CHOICES, help="fused: our own, for NVIDIA GPUs; plain: tinygrad's (auto: fused if it can)"
    )
    return parser


def gate(
    start: Start, trainer: Trainer, device: str, thread: ThreadPoolExecutor, imported: "Future[Any] | None"
) -> dict[str, Any]:
    """Proves the trainer's graphs on the batches that it is about to see. Returns JSON to keep in the run's folder, by
    file name.

    `thread` makes PyTorch's trainers while these graphs are captured: both take seconds. `imported` is the module
    parity_tests.gate, which that thread imports; None with --parity off.
    """
    options = start.options
    if imported is None:
        if start.ranks.rank == 0:
            print("PARITY NOT CHECKED (--parity off): nothing is proven about what this device computes")
        return {}
    if importlib.util.find_spec("torch") is None:
        raise InputError("the parity check before training needs PyTorch; `pip install torch`, or pass --parity off")
    if not options.quiet:
        print("comparing the training graphs with PyTorch (--parity off leaves it out)", flush=True)
    if imported.done():
        module_of(imported)  # what is wrong with it is told at once
    began = time.perf_counter()
    ready = thread.submit(lambda: module_of(imported).ready_references(start, device, trainer.backend))
    if start.ranks.size == 1:  # so that all that is compared comes from replaying the captured graphs, as in training
        position = start.loader.state()
        batches = start.loader.next_micro_batches(start.micro_batches)
        trainer.accumulate(batches[:2])
        start.loader.restore(position)
    setting, references = ready.result()
    thread.shutdown()  # a thread that ends gives back its cuBLAS handles and their memory, which this one then uses
    from parity_tests.gate import prove_graphs  # here, because it imports PyTorch

    certificate = prove_graphs(trainer, start, device, began, setting, references)
    if not options.quiet:
        print(certificate["summary"])
    return {"parity.json": certificate}


def module_of(imported: "Future[Any]") -> Any:
    """What the thread has imported. Raises `InputError` where it could not."""
    try:
        return imported.result()
    except ImportError as e:
        raise InputError(
            f"PyTorch cannot be imported ({e}), and the parity check before training needs it; install it anew (`pip "
            "install torch`), or pass --parity off"
        ) from e


def import_gate() -> Any:
    """The module parity_tests.gate, which takes seconds to import: it imports PyTorch."""
    with none_begins():
        return importlib.import_module("parity_tests.gate")


def main() -> None:
    given: Given = {"kernels": "auto"} | parse(parser(), sys.argv[1:])
    device = open_device(place_process("tinygrad_impl.train", sys.argv[1:], given, otherwise=DEV.device))
    note_idle_gpus(given, device)
    with joined(device, given.get("timeout", 600)) as ranks, begin(given, device, ranks) as start:
        train_from(start, given["kernels"], device)


def train_from(start: Start, kernels: str, device: str) -> None:
    options = start.options
    backend = choose(kernels, start.config, device, bfloat16=options.dtype == "bfloat16")
    thread, imported = ThreadPoolExecutor(1), None
    if options.parity != "off" and not options.find_lr:
        imported = thread.submit(import_gate)  # after `choose`, which imports Triton, as PyTorch does too
    trainer = Trainer(
        start.config,
        start.arrays,
        betas=options.betas,
        weight_decay=options.weight_decay,
        clip=options.clip,
        backend=backend,
        ranks=start.ranks,
        zero=options.zero != 0,
        reduce_dtype=options.reduce_dtype or "float32",
    )
    tokenizer = start.tokenizer
    generating = trainer.backend if backend.name == "fused" else Plain()
    generator = Generator(trainer.model, generating, tokenizer.vocab_size, tokenizer.eot)
    if start.moments:
        trainer.restore(start.arrays, start.moments, start.state["step"])

    def continued(prompt: str, tokens: int, sampler: Sampler, tick: Callable[[], object]) -> str:
        return continue_texts(generator, tokenizer, [prompt], tokens, sampler, tick)[0]

    evaluator, name = Evaluator(trainer.model, trainer.backend, trainer.arena), device_name(device)
    tinygrad = Implementation(
        package="tinygrad_impl",
        trainer=trainer,
        arrays=trainer.arrays,
        moments=trainer.moments,
        learning_rate=learning_rate,
        evaluate=evaluator.sums,
        continue_text=continued,
        device=device,
        device_name=name,
        peak_flops=peak_flops(name, options.dtype == "bfloat16"),
        kernels=backend.name,
        compiling=COMPILING,
        subject=Subject(evaluator.of_tokens, generator, tokenizer, start.config.context, batch_tokens(device)),
    )
    if options.find_lr:
        find_learning_rate(start, tinygrad)
    else:
        train(start, tinygrad, files=gate(start, trainer, device, thread, imported))


if __name__ == "__main__":
    run(main)
