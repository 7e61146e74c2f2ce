"""Sampling from the port. That its tokens are those of PyTorch is for parity_tests."""

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

import tinygrad_impl
import tinygrad_impl.generate as generate_module
from data.checkpoint import load, save
from data.config import GPT2Config
from data.initialize import initial_weights
from data.sampling import Sampler
from data.testing import SMALL, Result, call, refused, save_model
from data.tokenizer import EOT, VOCAB_SIZE, tokenizer
from tinygrad_impl.generate import CHUNK, CachedModel, Drawn, Generator, encode, main, pieces, write
from tinygrad_impl.model import GPT2, KVCache

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def generator(small: Path) -> Generator:
    return Generator(GPT2(*load(small)))


def generate(small: Path, *options: object) -> Result:
    result = call(main, "--model", small, "--device", "CPU", "--prompt", PROMPT, *options, cwd=small)
    assert result.code == 0, result
    return result


class Scripted(Sampler):
    """Draws what it is told to, a row of tokens a call, whatever the logits."""

    def __init__(self, *calls: list[int]):
        super().__init__()
        self.calls = iter(calls)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return np.array(next(self.calls))


def test_a_row_ends_before_the_end_of_text(generator: Generator) -> None:
    # the first row ends first, and what is drawn for it later must not appear; no fourth call is made
    sampler = Scripted([5, 6], [EOT, 7], [8, EOT])
    assert generator([[1, 2, 3]] * 2, 6, sampler) == [[5], [6, 7]]
    assert next(sampler.calls, None) is None


def test_the_end_of_text_is_never_written(tmp_path: Path) -> None:
    config, arrays = load(save_model(tmp_path / "all"))
    # the normalised stream becomes the same everywhere, and the end of text its likeliest continuation
    arrays["ln_f.weight"] = np.zeros_like(arrays["ln_f.weight"])
    arrays["ln_f.bias"] = np.ones_like(arrays["ln_f.bias"])
    wte = arrays["wte.weight"].copy()
    wte[EOT] = 1
    save(tmp_path / "ending", config, arrays | {"wte.weight": wte})
    assert generate(tmp_path / "ending", "--temperature", 0, "--max-new-tokens", 5).out == f"{PROMPT}\n"


def test_it_stops_after_max_new_tokens(generator: Generator) -> None:
    assert generator([[1], [2, 3]], 2, Scripted([4, 5], [6, 7])) == [[4, 6], [5, 7]]


def test_a_row_does_not_depend_on_the_others(generator: Generator) -> None:
    prompts = [[1, 2, 3, 4, 5], [9]]
    greedy = Sampler(temperature=0)
    together = generator(prompts, 4, greedy)
    assert together == [generator([prompt], 4, greedy)[0] for prompt in prompts]


def test_beyond_the_context_it_goes_on_from_the_last_half(generator: Generator) -> None:
    prompt = np.random.default_rng(0).integers(0, EOT, 2 * SMALL.n_positions).tolist()
    greedy = Sampler(temperature=0)
    half = SMALL.n_positions // 2
    new = generator([prompt], half + 3, greedy)[0]
    assert len(new) == half + 3
    assert new == generator([prompt[-half:]], half + 3, greedy)[0]  # the context is full, and slides, on the way
    assert new[-2:] == generator([(prompt + new[:-2])[-half:]], 2, greedy)[0]


def test_beyond_the_context_it_says_so(small: Path) -> None:
    result = generate(small, "--max-new-tokens", 40)
    assert result.err == "note: a text of more than 32 tokens goes on from its last 16\n"
    assert len(result.out) > len(PROMPT)
    assert generate(small, "--max-new-tokens", 28).err == ""


def test_the_seed_decides(small: Path) -> None:
    texts = [generate(small, "--max-new-tokens", 8, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_the_likeliest_token(generator: Generator, small: Path) -> None:
    text = generate(small, "--temperature", 0, "--max-new-tokens", 8, "--seed", 1).out
    assert text == generate(small, "--temperature", 0, "--max-new-tokens", 8, "--seed", 2).out
    assert text == generate(small, "--top-k", 1, "--max-new-tokens", 8).out
    assert text == write(generator, [PROMPT], 8, Sampler(temperature=0))[0] + "\n"


def test_bfloat16(small: Path) -> None:
    options = ("--max-new-tokens", 8, "--dtype")
    half = Generator(GPT2(*load(small)), dtypes.bfloat16)
    text = generate(small, *options, "bfloat16").out
    assert text == write(half, [PROMPT], 8, Sampler(0.8))[0] + "\n"
    assert text != generate(small, *options, "float32").out == generate(small, "--max-new-tokens", 8).out


def test_many_samples(small: Path) -> None:
    out = generate(small, "--num-samples", 3, "--max-new-tokens", 8).out
    texts = out.removesuffix("\n").split("\n\n---\n")
    assert len(set(texts)) == 3
    assert all(text.startswith(PROMPT) for text in texts)


def test_an_empty_prompt_begins_a_document(generator: Generator) -> None:
    greedy = Sampler(temperature=0)
    expected = tokenizer().decode(generator([[EOT]], 8, greedy)[0])
    assert write(generator, [""], 8, greedy) == [expected]


def test_a_prompt_cannot_smuggle_in_the_end_of_text() -> None:
    assert EOT not in encode("<|endoftext|>")


def test_nothing_is_compiled_anew(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's code runs in the first two calls of a graph; then no length of prompt or text makes it run again."""
    calls: list[int] = []
    hidden = GPT2.hidden

    def counted(self: GPT2, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        calls.append(tokens.shape[1])
        return hidden(self, tokens, cache)

    monkeypatch.setattr(GPT2, "hidden", counted)
    generator = Generator(GPT2(*load(small)))
    for prompt in ([1, 2], [3, 4, 5]):
        generator([prompt], 2, Scripted([6], [7]))
    assert sorted(calls) == [1, 1, CHUNK, CHUNK]
    long = list(range(2 * SMALL.n_positions))
    first = generator([long], 2 * SMALL.n_positions, Sampler(seed=1))
    assert generator([[8]], 1, Scripted([9])) == [[9]]
    assert generator([long], 2 * SMALL.n_positions, Sampler(seed=1)) == first
    assert len(calls) == 4


def test_a_token_is_computed_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, all but its last token, and every new token alone."""
    monkeypatch.setattr(generate_module, "CHUNK", 5)
    model = CachedModel(generator.model, 1)
    seen: list[tuple[int, list[int]]] = []

    def watched(graph: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[[Tensor, Tensor], Tensor | None]:
        def run(tokens: Tensor, lengths: Tensor) -> Tensor | None:
            seen.append((lengths.item(), tokens.tolist()[0]))
            return graph(tokens, lengths)

        return run

    model.prefill, model.decode = watched(model._prefill), watched(model._decode)
    monkeypatch.setattr(generator, "_models", {1: model})
    generator([[1, 2, 3, 4, 5, 6, 7, 8]], 3, Scripted([9], [10], [11]))
    chunks = [(0, [1, 2, 3, 4, 5]), (5, [6, 7, EOT, EOT, EOT])]
    assert seen == [*chunks, (7, [8]), (8, [9]), (9, [10])]


def test_probabilities_are_the_models_own(generator: Generator) -> None:
    """Whatever temperature, top-k and top-p make of them; by the model without a cache."""
    prompts = [[1, 2, 3], [4]]
    steps = list(generator.stream(prompts, 3, Sampler(0.5, 5, 0.9, seed=2)))
    assert len(steps) == 3
    for i, row in enumerate(prompts):
        for step in steps:
            drawn = step[i]
            assert drawn
            token, probability = drawn
            p = generator.model(Tensor([row + [EOT] * (8 - len(row))]))[0][0, len(row) - 1].softmax().numpy()
            assert probability == pytest.approx(p[token], rel=1e-4)
            row.append(token)


def test_a_stream_says_which_rows_have_ended(generator: Generator) -> None:
    steps = list(generator.stream([[1], [2]], 6, Scripted([5, 6], [EOT, 7], [8, EOT])))
    assert [[drawn and drawn[0] for drawn in step] for step in steps] == [[5, 6], [None, 7]]
    assert all(0 < drawn[1] < 1 for step in steps for drawn in step if drawn)


def test_pieces_are_whole_characters() -> None:
    text = "naïve 🙂日本"
    tokens = tokenizer().encode_ordinary(text)
    assert any("\ufffd" in tokenizer().decode([token]) for token in tokens)  # a character is split
    found = list(pieces((token, 0.5) for token in tokens))
    assert "".join(piece for piece, _ in found) == text
    assert "\ufffd" not in text
    assert len(found) < len(tokens)
    assert {p for _, p in found} > {0.5}
    assert math.prod(p for _, p in found) == 0.5 ** len(tokens)


def test_pieces_together_are_what_decoding_gives() -> None:
    """Also where bytes make no character, and where the text ends in the middle of one."""
    random = np.random.default_rng(0)
    parts = np.array([t for t in range(VOCAB_SIZE) if max(tokenizer().decode_single_token_bytes(t)) > 127])
    for _ in range(200):
        tokens = random.choice(parts, 12).tolist()
        assert "".join(piece for piece, _ in pieces((token, 1.0) for token in tokens)) == tokenizer().decode(tokens)


def test_one_text_is_written_as_it_comes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is out before the next is computed, and Ctrl-C ends it with what there is."""
    new = tokenizer().encode_ordinary(" a 🦙")
    flushed: list[str] = []
    shown: list[str] = []

    class Watched(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    def stream(*_: object) -> Iterator[list[Drawn | None]]:
        for token in new:
            shown.append(flushed[-1])
            yield [(token, 0.5)]
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", stream)
    monkeypatch.setattr("data.testing.io.StringIO", Watched)
    result = call(main, "--model", small, "--device", "CPU", "--prompt", PROMPT, cwd=small)
    assert result.code == 130
    assert result.out == f"{PROMPT} a 🦙"
    assert shown[:2] == [PROMPT, f"{PROMPT} a"]
    assert len(shown) == len(new) > 2


def test_what_is_streamed_is_what_is_written(small: Path, generator: Generator) -> None:
    out = generate(small, "--max-new-tokens", 40, "--temperature", 2, "--seed", 3).out
    assert out == write(generator, [PROMPT], 40, Sampler(2.0, seed=3))[0] + "\n"


def test_many_prompts(small: Path, generator: Generator) -> None:
    """As one batch, in the order given, each as many times as asked for."""
    options = ("--prompt", "The dog was sad because", "--num-samples", 2, "--max-new-tokens", 6)
    texts = generate(small, *options).out.removesuffix("\n").split("\n\n---\n")
    prompts = [PROMPT, PROMPT, "The dog was sad because", "The dog was sad because"]
    assert texts == write(generator, prompts, 6, Sampler(0.8))
    assert len(set(texts)) == 4


def test_a_run_is_its_latest_checkpoint(small: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    save_model(checkpoints / "step-0", seed=2)
    save(checkpoints / "step-5", *load(small))
    (checkpoints / "latest").write_text("step-5\n")
    text = generate(tmp_path / "run", "--max-new-tokens", 4).out
    assert text == generate(small, "--max-new-tokens", 4).out
    assert text != generate(checkpoints / "step-0", "--max-new-tokens", 4).out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--num-samples", "two"], "--num-samples"),
        (["--temperature", -1], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", 0], "--top-k"),
        (["--top-p", 0], "--top-p"),
        (["--top-p", 1.5], "top-p is 1.5"),
        (["--seed", -1], "--seed"),
        (["--device", "abacus"], "there is no device ABACUS"),
        (["--dtype", "float16"], "--dtype"),
        (["--tempo", 1], "--tempo"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_bad_options(options: list[object], word: str, small: Path) -> None:
    refused(call(main, "--model", small, *options, cwd=small), word)


def test_no_model_is_named(tmp_path: Path) -> None:
    refused(call(main, cwd=tmp_path), "--model")


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    refused(call(main, "--model", tmp_path, cwd=tmp_path), "no checkpoint yet")


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE + 47])
def test_a_model_of_another_vocabulary(vocab_size: int, tmp_path: Path) -> None:
    """What a larger one may draw, the tokenizer cannot write; a smaller one does not know every prompt."""
    config = GPT2Config(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4, n_positions=8)
    arrays = initial_weights(config, 1)
    arrays["wte.weight"][-1] = 1  # the likeliest token, as in the test of the end of text
    arrays["ln_f.weight"][:], arrays["ln_f.bias"][:] = 0, 1
    save(tmp_path / "other", config, arrays)
    options = ("--device", "CPU", "--temperature", 0, "--max-new-tokens", 2)
    result = call(main, "--model", tmp_path / "other", *options, cwd=tmp_path)
    if vocab_size < VOCAB_SIZE:
        refused(result, "tokens, the tokenizer")
    else:
        assert result.code in (0, 2)


def test_as_a_program(small: Path) -> None:
    """What only a process of its own shows: the module runs, and stdout has the text and nothing else."""
    command = [sys.executable, "-m", "tinygrad_impl.generate", "--model", str(small), "--prompt", PROMPT]
    command += ["--device", "CPU", "--max-new-tokens", "4", "--seed", "3"]
    root = Path(tinygrad_impl.__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=os.environ | {"DEV": ""}, capture_output=True, text=True, check=True)
    assert result.stdout == generate(small, "--max-new-tokens", 4, "--seed", 3).out
    assert result.stderr == ""
