"""Sampling from the port. That its tokens are those of PyTorch is for parity_tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinygrad_impl
from data.checkpoint import load, save
from data.config import GPT2Config
from data.initialize import initial_weights
from data.sampling import Sampler
from data.tokenizer import EOT, VOCAB_SIZE, tokenizer
from tinygrad_impl.generate import Generator, main, write
from tinygrad_impl.model import GPT2
from tinygrad_impl.tests.support import SMALL, Result, call, refused, save_model

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


def test_beyond_the_context_it_sees_the_last_tokens(generator: Generator) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(0, EOT, 2 * SMALL.n_positions).tolist()
    greedy = Sampler(temperature=0)
    new = generator([prompt], 3, greedy)[0]
    assert len(new) == 3
    assert new == generator([prompt[-SMALL.n_positions :]], 3, greedy)[0]
    whole = Sampler(temperature=0)
    for i in range(3):  # and each is what a model says that is given just those tokens
        seen = (prompt + new[:i])[-SMALL.n_positions :]
        assert generator([seen], 1, whole)[0] == [new[i]]


def test_beyond_the_context_it_says_so(small: Path) -> None:
    result = generate(small, "--max-new-tokens", 40)
    assert result.err == "note: beyond 32 tokens the model sees only the last 32\n"
    assert len(result.out) > len(PROMPT)
    assert generate(small, "--max-new-tokens", 8).err == ""


def test_the_seed_decides(small: Path) -> None:
    texts = [generate(small, "--max-new-tokens", 8, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_the_likeliest_token(generator: Generator, small: Path) -> None:
    text = generate(small, "--temperature", 0, "--max-new-tokens", 8, "--seed", 1).out
    assert text == generate(small, "--temperature", 0, "--max-new-tokens", 8, "--seed", 2).out
    assert text == generate(small, "--top-k", 1, "--max-new-tokens", 8).out
    assert text == write(generator, PROMPT, 8, 1, Sampler(temperature=0))[0] + "\n"


def test_many_samples(small: Path) -> None:
    out = generate(small, "--num-samples", 3, "--max-new-tokens", 8).out
    texts = out.removesuffix("\n").split("\n\n---\n")
    assert len(set(texts)) == 3
    assert all(text.startswith(PROMPT) for text in texts)


def test_an_empty_prompt_begins_a_document(generator: Generator) -> None:
    greedy = Sampler(temperature=0)
    expected = tokenizer().decode(generator([[EOT]], 8, greedy)[0])
    assert write(generator, "", 8, 1, greedy) == [expected]


def test_a_prompt_cannot_smuggle_in_the_end_of_text(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def watched(self: Generator, prompts: list[list[int]], *_: object) -> list[list[int]]:
        seen.extend(prompts)
        return [[]]

    monkeypatch.setattr(Generator, "__call__", watched)
    write(generator, "<|endoftext|>", 1, 1, Sampler())
    assert EOT not in seen[0]


def test_graphs_are_kept(small: Path) -> None:
    generator = Generator(GPT2(*load(small)))
    first = write(generator, PROMPT, 4, 1, Sampler(seed=1))
    graphs = dict(generator._graphs)
    assert len(graphs) == 1
    assert write(generator, PROMPT, 4, 1, Sampler(seed=1)) == first
    other = write(generator, "The dog", 5, 1, Sampler(seed=1))  # of another length, padded to the same
    assert generator._graphs == graphs
    assert other[0].startswith("The dog")


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
