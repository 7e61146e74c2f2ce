"""Sampling from the port, and `python -m tinygrad_impl.generate`. torch_ref/generate.py is its reference."""

import sys

import numpy as np
from tinygrad import Tensor, TinyJit

from data.checkpoint import load
from data.cli import ArgumentParser, InputError, real, run, whole
from data.sampling import Sampler
from data.tokenizer import EOT, VOCAB_SIZE, tokenizer
from tinygrad_impl.device import open_device
from tinygrad_impl.model import GPT2


class Generator:
    """Samples from a model, with one compiled graph for each size of the token array, kept from call to call.

    Raises `InputError` for a model with fewer tokens than the tokenizer.
    """

    def __init__(self, model: GPT2):
        if model.config.vocab_size < VOCAB_SIZE:
            raise InputError(
                f"the model has {model.config.vocab_size} tokens, the tokenizer {VOCAB_SIZE}; choose other weights"
            )
        self.model = model
        self._graphs: dict[tuple[int, int], TinyJit] = {}

    def __call__(self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler) -> list[list[int]]:
        """Continues each prompt (at least one token) by up to max_new_tokens; a row ends before `EOT`.

        Returns the new tokens of each row. Beyond n_positions the model sees the last n_positions tokens.
        """
        rows = [list(prompt) for prompt in prompts]
        ended = [False] * len(rows)
        longest = max(map(len, rows)) + max_new_tokens
        # what is right of a position does not reach it, so rows are padded there, all to one of a few lengths
        length = min(self.model.config.n_positions, 1 << (longest - 1).bit_length())
        graph = self._graphs.setdefault((len(rows), length), TinyJit(self._logits))
        for _ in range(max_new_tokens):
            seen = [row[-length:] for row in rows]
            tokens = np.array([row + [EOT] * (length - len(row)) for row in seen], np.int32)
            last = np.array([[len(row) - 1] for row in seen], np.int32)
            logits = graph(Tensor(tokens).realize(), Tensor(last).realize()).numpy()
            for i, token in enumerate(sampler(logits)):
                ended[i] = ended[i] or token == EOT
                if not ended[i]:
                    rows[i].append(int(token))
            if all(ended):
                break
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    def _logits(self, tokens: Tensor, last: Tensor) -> Tensor:
        """tokens (N, T), last (N, 1) -> the logits (N, VOCAB_SIZE) after position `last` of each row."""
        at_last = (Tensor.arange(tokens.shape[1]) == last).unsqueeze(-1)  # (N, T, 1)
        x = at_last.where(self.model.hidden(tokens), 0).sum(1, keepdim=True)  # (N, 1, C)
        return self.model.head(x)[:, 0, :VOCAB_SIZE].float().realize()


def write(generator: Generator, prompt: str, max_new_tokens: int, num_samples: int, sampler: Sampler) -> list[str]:
    """`num_samples` continuations of a prompt, the prompt included. An empty prompt begins a new document."""
    tokens = tokenizer().encode_ordinary(prompt) or [EOT]
    return [prompt + tokenizer().decode(new) for new in generator([tokens] * num_samples, max_new_tokens, sampler)]


def add_sampling_options(parser: ArgumentParser) -> None:
    """The options that `generate` and `compare` share."""
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=200, metavar="N", help="stop there, or at the end of the text"
    )
    parser.add_argument(
        "--temperature", type=real(0), default=0.8, metavar="X", help="0 takes the likeliest token each time"
    )
    parser.add_argument("--top-k", type=whole(1), metavar="N", help="draw from the k likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=real(0, closed=False),
        metavar="X",
        help="draw from the fewest tokens that reach this probability only",
    )
    parser.add_argument("--seed", type=whole(0), metavar="N", default=0, help="the same seed gives the same text")
    parser.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.generate",
        description="Continue a prompt. A text longer than the model's context goes on from its last tokens.",
        epilog='example: python -m tinygrad_impl.generate --model runs/mine --prompt "One day" --num-samples 3',
    )
    parser.add_argument(
        "--model", required=True, help="a run, a folder with config.json and model.safetensors, or gpt2"
    )
    parser.add_argument("--prompt", default="Once upon a time", help="the text to continue")
    parser.add_argument("--num-samples", type=whole(1), default=1, metavar="N", help="texts to write")
    add_sampling_options(parser)
    args = parser.parse_args()
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    config, arrays = load(args.model)
    open_device(args.device)
    generator = Generator(GPT2(config, {name: a.astype(np.float32) for name, a in arrays.items()}))
    length = len(tokenizer().encode_ordinary(args.prompt)) + args.max_new_tokens
    if length > config.n_positions:
        print(
            f"note: beyond {config.n_positions} tokens the model sees only the last {config.n_positions}",
            file=sys.stderr,
        )
    for i, text in enumerate(write(generator, args.prompt, args.max_new_tokens, args.num_samples, sampler)):
        print(text if i == 0 else f"\n---\n{text}")


if __name__ == "__main__":
    run(main)
