"""Sampling from the port, and `python -m tinygrad_impl.generate`. torch_ref/generate.py is its reference."""

import codecs
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config, parameter_count
from data.cli import ArgumentParser, InputError, Progress, real, run, whole
from data.runs.run_folder import sampling_of
from data.text.sampling import SAMPLING, Sampler
from data.text.tokenizer import EOT, VOCAB_SIZE, tokenizer
from tinygrad_impl.backend import Backend, Plain, choose
from tinygrad_impl.cached_model import Decoder
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.model import GPT2

CHUNK = 32  # tokens of a prompt at a time
COMPILING = 2  # the first calls of a graph, which TinyJit captures in the second of them

Drawn = tuple[int, float]  # a token, and how probable the model found it


class Generator:
    """Samples from a model with a cache of keys and values, one batch of texts at a time.

    Cache and graphs are kept from call to call, for each size of a batch. `backend` computes; the first `V` of the
    model's tokens are drawn from. Raises `InputError` for a model that has fewer.
    """

    def __init__(self, model: GPT2, backend: Backend | None = None, V: int = VOCAB_SIZE):
        if model.config.vocab_size < V:
            raise InputError(f"the model has {model.config.vocab_size} tokens, the tokenizer {V}; choose other weights")
        self.model, self.backend, self.V = model, backend or Plain(), V
        self._decoders: dict[int, Decoder] = {}  # by batch size

    def decoder(self, N: int) -> Decoder:
        """The model with a cache of N rows."""
        if N not in self._decoders:
            self._decoders[N] = self.backend.decoder(self.model, N, CHUNK, self.V)
        return self._decoders[N]

    def __call__(
        self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, tick: Callable[[], object] = int
    ) -> list[list[int]]:
        """The tokens of `stream`, row by row. `tick` is called after each step."""
        steps = []
        for step in self.stream(prompts, max_new_tokens, sampler):
            steps.append(step)
            tick()
        return [[drawn[0] for step in steps if (drawn := step[i])] for i in range(len(prompts))]

    def stream(self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler) -> Iterator[list[Drawn | None]]:
        """Continues each prompt (at least one token) by up to max_new_tokens; a row ends before `EOT`.

        Gives, step by step, the token that each row drew with its probability, or None for a row that has ended, until
        all have. The probability is the model's own: the softmax of its logits, without temperature, top-k and top-p.
        A row of more tokens than the model's context, be it by its prompt, goes on from its last context // 2 (from
        its last one, if that is none), which then grow to a context again, and so on.
        """
        N, context = len(prompts), self.model.config.context
        rows = [list(prompt) for prompt in prompts]
        ended = [False] * N
        starts = [0] * N  # where in its row begins what the model sees
        held = [0] * N  # how many tokens from there on the cache has
        model, steps = self.decoder(N), 0
        while steps < max_new_tokens:
            for i, row in enumerate(rows):
                if len(row) - starts[i] > context:
                    # no key or value can stay: every token has another position now
                    starts[i], held[i] = len(row) - max(1, context // 2), 0
            while any(chunks := [rows[i][starts[i] + held[i] : -1][:CHUNK] for i in range(N)]):
                # what is right of a position does not reach it, so shorter rows are padded there
                tokens = np.array([chunk + [0] * (CHUNK - len(chunk)) for chunk in chunks], np.int32)
                model.add(tokens, np.array(held, np.int32))
                for i, chunk in enumerate(chunks):
                    held[i] += len(chunk)
            tokens, lengths = np.array([row[-1] for row in rows], np.int32), np.array(held, np.int32)
            most = min(max_new_tokens - steps, context - max(held))  # until the first row's context is full
            for drawn, probabilities in model.draw(tokens, lengths, most, sampler):
                step: list[Drawn | None] = [None] * N
                for i, (token, p) in enumerate(zip(drawn.tolist(), probabilities.tolist(), strict=True)):
                    ended[i] = ended[i] or token == EOT
                    if not ended[i]:
                        rows[i].append(token)
                        held[i] += 1
                        step[i] = token, p
                if all(ended):
                    return
                steps += 1
                yield step


def encode(prompt: str) -> list[int]:
    """The tokens of a prompt. An empty one begins a new document."""
    return tokenizer().encode_ordinary(prompt) or [EOT]


def pieces(drawn: Iterable[Drawn]) -> Iterator[tuple[str, float]]:
    """The text of tokens as they come, each piece with its probability; together what decoding all at once gives.

    A character whose bytes are spread over several tokens comes with the last of them, and with their product.
    """
    decoder, product = codecs.getincrementaldecoder("utf-8")("replace"), 1.0
    for token, p in drawn:
        product *= p
        if text := decoder.decode(tokenizer().decode_single_token_bytes(token)):
            yield text, product
            product = 1.0
    if text := decoder.decode(b"", final=True):
        yield text, product


def continue_texts(
    generator: Generator, prompts: list[str], max_new_tokens: int, sampler: Sampler, tick: Callable[[], object] = int
) -> list[str]:
    """The prompts continued, each with its beginning. `tick` is called after each token of theirs."""
    new = generator([encode(prompt) for prompt in prompts], max_new_tokens, sampler, tick)
    return [prompt + tokenizer().decode(tokens) for prompt, tokens in zip(prompts, new, strict=True)]


def backend_for(dtype: str | None, config: GPT2Config, device: str) -> Backend:
    """The backend for --dtype, of which None is bfloat16 on an NVIDIA GPU and float32 elsewhere."""
    if (dtype or ("bfloat16" if device == "CUDA" else "float32")) == "float32":
        return Plain()
    return choose("auto", config, device, bfloat16=True)


def setup(model: str, config: GPT2Config, device: str, backend: Backend) -> str:
    """What computes a model, in a line as `train` has it."""
    dtype, size = "bfloat16" if backend.dtype else "float32", f"{parameter_count(config) / 1e6:.1f}M parameters"
    return f"{model}, {size}; {device_name(device)}, {dtype}, {backend.name} kernels"


def add_sampling_options(parser: ArgumentParser) -> Any:
    """The options that `generate` and `compare` share. Returns argparse's group of those of sampling."""
    parser.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of products (bfloat16 on an NVIDIA GPU, else float32)"
    )
    group = parser.add_argument_group(
        "sampling",
        "What is left out is as in the samples of the run, where the model is a run, or else as in brackets. Where a "
        "text has more tokens than the model's context (gpt2: 1024), it goes on from the last half of a context (512), "
        "until that is full again, and so on.",
    )
    group.add_argument(
        "--max-new-tokens", type=whole(1), metavar="N", help="stop there (160), or at the end of the text"
    )
    group.add_argument("--temperature", type=real(0), metavar="X", help="0 takes the likeliest token each time (0.6)")
    group.add_argument(
        "--top-k", type=whole(0), metavar="N", help="draw from the N likeliest tokens only (40); 0: from all"
    )
    group.add_argument(
        "--top-p",
        type=real(0, closed=False),
        metavar="X",
        help="draw from the fewest tokens that reach this probability only",
    )
    group.add_argument("--seed", type=whole(0), metavar="N", help="the same seed gives the same text (1337)")
    return group


def sampling(args: Namespace, model: str) -> dict[str, Any]:
    """The settings of sampling as `SAMPLING` has them: those given, and the model's own for the others."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    settings = sampling_of(model) | given
    settings["top_k"] = settings["top_k"] or None
    Sampler(**{name: value for name, value in settings.items() if name != "max_new_tokens"})  # refuses bad values
    return settings


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.generate",
        usage="%(prog)s --model MODEL [--prompt TEXT] [options]",
        description="Continue a prompt. One text is written as it comes, several when all of them are done.",
        epilog='example: python -m tinygrad_impl.generate --model runs/mine --prompt "One day" --num-samples 3',
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a run, a folder with config.json and model.safetensors, or gpt2",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to continue (Once upon a time); may be given many times",
    )
    parser.add_argument(
        "--num-samples", type=whole(1), default=1, metavar="N", help="texts to write for each prompt (1)"
    )
    add_sampling_options(parser)
    args = parser.parse_args()
    settings = sampling(args, args.model)
    new = settings.pop("max_new_tokens")
    sampler = Sampler(**settings)
    config, arrays = load(args.model)
    device = open_device(args.device)
    model = GPT2(config, {name: a.astype(np.float32) for name, a in arrays.items()})
    backend = backend_for(args.dtype, config, device)
    generator = Generator(model, backend)
    print(setup(args.model, config, device, backend), file=sys.stderr)
    prompts = [prompt for prompt in args.prompt or ["Once upon a time"] for _ in range(args.num_samples)]
    if max(len(encode(prompt)) for prompt in prompts) + new > config.context:
        untrained = config.context < config.n_positions
        why = f"; of its {config.n_positions} positions the others are untrained" if untrained else ""
        last = max(1, config.context // 2)
        print(f"note: a text of more than {config.context} tokens goes on from its last {last}{why}", file=sys.stderr)
    if len(prompts) == 1:
        print("compiling before the first token", file=sys.stderr, flush=True)
        print(prompts[0], end="", flush=True)
        steps = generator.stream([encode(prompts[0])], new, sampler)
        for text, _ in pieces(drawn for [drawn] in steps if drawn):
            print(text, end="", flush=True)
        print()
    else:
        with Progress(total=new, desc="writing", unit="token", compiling=COMPILING) as progress:
            texts = continue_texts(generator, prompts, new, sampler, progress.update)
        print("\n\n---\n".join(texts))


if __name__ == "__main__":
    run(main)
