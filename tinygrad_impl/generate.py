"""Sampling from the port, and `python -m tinygrad_impl.generate`. torch_ref/generate.py is its reference."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, resolve
from data.checkpoints.config import GPT2Config, parameter_count
from data.cli import ArgumentParser, InputError, Progress, integer, real, run
from data.ranks import refuse_ranks
from data.runs.run_folder import sampling_of
from data.text.sampling import SAMPLING, Sampler
from data.text.tokenizer import Tokenizer, of_folder
from tinygrad_impl.backend import Backend, Plain, choose
from tinygrad_impl.cached_model import Decoder
from tinygrad_impl.device import device_name, open_device
from tinygrad_impl.model import GPT2

CHUNK = 32  # tokens of a prompt at a time, at least
COMPILING = 2  # the first calls of a graph, which TinyJit captures in the second of them

Drawn = tuple[int, float]  # a token, and how probable the model found it

KINDS: dict[str, Callable[[str], Any]] = {  # of the settings of sampling, as they are typed
    "temperature": real(0),
    "top_k": integer(0),
    "top_p": real(0, closed=False, most=1),
    "seed": integer(0),
    "max_new_tokens": integer(1),
}


class Generator:
    """Samples from a model with a cache of keys and values, one batch of texts at a time.

    Cache and graphs are kept from call to call, for each size of a batch. `backend` computes; the first `V` of the
    model's tokens are drawn from, those of its tokenizer (None: all), and a text ends before the token `eot` (None:
    never). Raises `InputError` for a model of fewer than V tokens; and while it writes, where the model has a `name`,
    for one that gives NaN, of which token 0 would be drawn for ever.
    """

    def __init__(
        self,
        model: GPT2,
        backend: Backend | None = None,
        V: int | None = None,
        eot: int | None = None,
        name: str | None = None,
    ):
        rows = model.config.vocab_size
        self.model, self.backend, self.V, self.eot, self.name = model, backend or Plain(), V or rows, eot, name
        if rows < self.V:
            raise InputError(f"the model has {rows} tokens, the tokenizer {V}; choose other weights")
        self._decoders: dict[int, Decoder] = {}  # by batch size

    def decoder(self, N: int) -> Decoder:
        """The model with a cache of N rows."""
        if N not in self._decoders:
            self._decoders[N] = self.backend.decoder(self.model, N, self.chunk(N), self.V)
        return self._decoders[N]

    def chunk(self, N: int) -> int:
        """How many tokens of each of N prompts are added to the cache at a time."""
        return max(CHUNK, min(self.backend.prompt_tokens // N, self.model.config.context))

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
        """Continues each prompt (at least one token) by up to max_new_tokens; a row ends before `eot`.

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
        model, size, steps = self.decoder(N), self.chunk(N), 0
        while steps < max_new_tokens:
            for i, row in enumerate(rows):
                if len(row) - starts[i] > context:
                    # no key or value can stay: every token has another position now
                    starts[i], held[i] = len(row) - max(1, context // 2), 0
            while any(chunks := [rows[i][starts[i] + held[i] : -1][:size] for i in range(N)]):
                # what is right of a position does not reach it, so shorter rows are padded there
                most = max(map(len, chunks))
                tokens = np.array([chunk + [0] * (most - len(chunk)) for chunk in chunks], np.int32)
                model.add(tokens, np.array(held, np.int32))
                for i, chunk in enumerate(chunks):
                    held[i] += len(chunk)
            tokens, lengths = np.array([row[-1] for row in rows], np.int32), np.array(held, np.int32)
            most = min(max_new_tokens - steps, context - max(held))  # until the first row's context is full
            for drawn, probabilities in model.draw(tokens, lengths, most, sampler):
                if self.name and np.isnan(probabilities).any():
                    raise InputError(not_a_number(self.name))
                step: list[Drawn | None] = [None] * N
                for i, (token, p) in enumerate(zip(drawn.tolist(), probabilities.tolist(), strict=True)):
                    ended[i] = ended[i] or token == self.eot
                    if not ended[i]:
                        rows[i].append(token)
                        held[i] += 1
                        step[i] = token, p
                if all(ended):
                    return
                steps += 1
                yield step


def not_a_number(model: str) -> str:
    """What is said of a model that gives NaN or infinity."""
    return (
        f"what {model} computes is not a number (NaN or infinity): its weights are damaged, or too large for its "
        "dtype; give other weights, or --dtype float32"
    )


def encode(tokenizer: Tokenizer, prompt: str, special_tokens: bool = False) -> list[int]:
    """The tokens of a prompt. An empty one begins a new document. special_tokens: as in `Tokenizer.encode`."""
    return tokenizer.encode(prompt, special_tokens) or [tokenizer.eot]


def pieces(tokenizer: Tokenizer, before: Sequence[int], drawn: Iterable[Drawn]) -> Iterator[tuple[str, float]]:
    """The text of tokens as they come after those `before`, each piece with its probability; together what decoding all
    at once gives.

    A character whose bytes are spread over several tokens comes with the last of them, and with their product.
    """
    following, product = tokenizer.incremental(before), 1.0
    for token, p in drawn:
        product *= p
        if text := following(token):
            yield text, product
            product = 1.0
    if text := following(None):
        yield text, product


def continue_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    tick: Callable[[], object] = int,
    *,
    special_tokens: bool = False,
) -> list[str]:
    """The prompts continued, each with its beginning. special_tokens: as in `Tokenizer.encode`. `tick` is called after
    each token of theirs.
    """
    rows = [encode(tokenizer, prompt, special_tokens) for prompt in prompts]
    texts = []
    for prompt, row, new in zip(prompts, rows, generator(rows, max_new_tokens, sampler, tick), strict=True):
        texts.append(prompt + "".join(text for text, _ in pieces(tokenizer, row, ((token, 1.0) for token in new))))
    return texts


def backend_for(dtype: str | None, config: GPT2Config, device: str) -> Backend:
    """The backend for --dtype, of which None is bfloat16 on an NVIDIA GPU and float32 elsewhere."""
    if (dtype or ("bfloat16" if device == "CUDA" else "float32")) == "float32":
        return Plain()
    return choose("auto", config, device, bfloat16=True)


def setup(model: str, config: GPT2Config, device: str, backend: Backend) -> str:
    """What computes a model, in a line as `train` has it."""
    dtype, size = "bfloat16" if backend.dtype else "float32", f"{parameter_count(config) / 1e6:.1f}M parameters"
    return f"{model}, {size}; {device_name(device)}, {dtype}, {backend.name} kernels"


def outgrown(config: GPT2Config, tokens: int) -> str:
    """What happens to a text of so many tokens where they are more than the model's context; empty where not."""
    if tokens <= config.context:
        return ""
    untrained = config.context < config.n_positions
    why = f"; of its {config.n_positions} positions the others are untrained" if untrained else ""
    return f"a text of more than {config.context} tokens goes on from its last {max(1, config.context // 2)}{why}"


def add_sampling_options(parser: ArgumentParser) -> Any:
    """The options that `generate` and `compare` share. Returns argparse's group of those of sampling."""
    parser.add_argument("--device", help="CPU, CUDA, METAL, ...; by default the best there is")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of matmuls (bfloat16 on an NVIDIA GPU, else float32)"
    )
    group = parser.add_argument_group(
        "sampling",
        "What is left out is as in the samples of the run, where the model is a run, or else as in brackets. Where a "
        "text has more tokens than the model's context (gpt2: 1024), it goes on from the last half of a context (512), "
        "until that is full again, and so on.",
    )
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="what spells a special token in a prompt, such as <|endoftext|>, becomes that token",
    )
    group.add_argument(
        "--max-new-tokens",
        type=KINDS["max_new_tokens"],
        metavar="N",
        help="stop there (160), or at the end of the text",
    )
    group.add_argument(
        "--temperature", type=KINDS["temperature"], metavar="X", help="0 takes the likeliest token each time (0.6)"
    )
    group.add_argument(
        "--top-k", type=KINDS["top_k"], metavar="N", help="draw from the N likeliest tokens only (40); 0: from all"
    )
    group.add_argument(
        "--top-p",
        type=KINDS["top_p"],
        metavar="X",
        help="draw from the fewest tokens that reach this probability only",
    )
    group.add_argument("--seed", type=KINDS["seed"], metavar="N", help="the same seed gives the same text (1337)")
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
        "--num-samples", type=integer(1), default=1, metavar="N", help="texts to write for each prompt (1)"
    )
    add_sampling_options(parser)
    args = parser.parse_args()
    refuse_ranks("generation")
    settings = sampling(args, args.model)
    new = settings.pop("max_new_tokens")
    sampler = Sampler(**settings)
    config, arrays = load(args.model)
    tokenizer = of_folder(resolve(args.model), config.vocab_size)
    device = open_device(args.device)
    model = GPT2(config, {name: a.astype(np.float32) for name, a in arrays.items()})
    backend = backend_for(args.dtype, config, device)
    generator = Generator(model, backend, tokenizer.vocab_size, tokenizer.eot, args.model)
    print(setup(args.model, config, device, backend), file=sys.stderr)
    prompts = [prompt for prompt in args.prompt or ["Once upon a time"] for _ in range(args.num_samples)]
    rows = [encode(tokenizer, prompt, args.special_tokens) for prompt in prompts]
    if said := outgrown(config, max(map(len, rows)) + new):
        print(f"note: {said}", file=sys.stderr)
    if len(prompts) == 1:
        print("compiling before the first token", file=sys.stderr, flush=True)
        print(prompts[0], end="", flush=True)
        steps = generator.stream(rows, new, sampler)
        for text, _ in pieces(tokenizer, rows[0], (drawn for [drawn] in steps if drawn)):
            print(text, end="", flush=True)
        print()
    else:
        special = args.special_tokens
        with Progress(total=new, desc="writing", unit="token", compiling=COMPILING) as progress:
            texts = continue_texts(generator, tokenizer, prompts, new, sampler, progress.update, special_tokens=special)
        print("\n\n---\n".join(texts))


if __name__ == "__main__":
    run(main)
