"""`python -m torch_ref.evaluate`: a model on the tasks of lm-evaluation-harness, by the reference."""

from argparse import Namespace

import numpy as np
import torch

from data.checkpoints.config import GPT2Config, parameter_count
from data.cli import InputError, counted, run
from data.evaluation.command import Opened, evaluate, parser
from data.evaluation.subject import Subject, batch_tokens
from data.gpu import numbered, show_one_gpu
from data.text.sampling import Sampler
from data.text.tokenizer import Tokenizer
from torch_ref.generate import generate
from torch_ref.losses import Evaluator
from torch_ref.model import GPT2


def opened(args: Namespace, config: GPT2Config, arrays: dict[str, np.ndarray], tokenizer: Tokenizer) -> Opened:
    wanted = args.device or ("CUDA" if torch.cuda.is_available() else "CPU")
    device, number = numbered(wanted)
    if number is not None:
        show_one_gpu(number)
    if device not in ("CPU", "CUDA") or (device == "CUDA" and not torch.cuda.is_available()):
        raise InputError(f"PyTorch has no device {wanted!r} here; leave --device out for the best there is")
    dtype = args.dtype or ("bfloat16" if device == "CUDA" else "float32")
    model = GPT2(config, arrays).to(device.lower())
    subject = subject_of(model, tokenizer, device, torch.bfloat16 if dtype == "bfloat16" else None)
    name = (
        torch.cuda.get_device_name() if device == "CUDA" else f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    )
    said = f"PyTorch, {parameter_count(config) / 1e6:.1f}M parameters; {name}, {dtype}"
    return subject, {"device": name, "dtype": dtype}, said


def subject_of(model: GPT2, tokenizer: Tokenizer, device: str, autocast: torch.dtype | None) -> Subject:
    """The model as an evaluation wants it."""

    def written(prompts: list[list[int]], most: int, sampler: Sampler) -> list[list[int]]:
        return generate(model, prompts, most, sampler, tokenizer.vocab_size, tokenizer.eot, cached=True)

    losses = Evaluator(model, autocast).of_tokens
    return Subject(losses, written, tokenizer, model.config.context, batch_tokens(device))


def main() -> None:
    evaluate(parser("python -m torch_ref.evaluate", "PyTorch").parse_args(), "torch_ref", opened)


if __name__ == "__main__":
    run(main)
