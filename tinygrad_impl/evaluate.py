"""`python -m tinygrad_impl.evaluate`: a model on the tasks of lm-evaluation-harness, by the port's graphs."""

from argparse import Namespace

import numpy as np

from data.checkpoints.config import GPT2Config
from data.cli import run
from data.evaluation.command import Opened, evaluate, parser
from data.evaluation.subject import Subject, batch_tokens
from data.text.tokenizer import Tokenizer
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.generate import Generator, backend_for, setup
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2


def opened(args: Namespace, config: GPT2Config, arrays: dict[str, np.ndarray], tokenizer: Tokenizer) -> Opened:
    device = open_device(args.device)
    model, backend = GPT2(config, arrays), backend_for(args.dtype, config, device)
    generator = Generator(model, backend, tokenizer.vocab_size, tokenizer.eot)
    losses = Evaluator(model, backend).of_tokens
    dtype = "bfloat16" if backend.dtype else "float32"
    facts = {"device": device_name(device), "dtype": dtype, "kernels": backend.name}
    subject = Subject(losses, generator, tokenizer, config.context, batch_tokens(device))
    return subject, facts, setup("tinygrad", config, device, backend)


def main() -> None:
    evaluate(parser("python -m tinygrad_impl.evaluate", "tinygrad").parse_args(), "tinygrad_impl", opened)


if __name__ == "__main__":
    run(main)
