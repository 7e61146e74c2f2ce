"""Sampling from the port. That its tokens are those of PyTorch is for parity_tests."""

import io
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tinygrad import Tensor, dtypes

import tinygrad_impl
import tinygrad_impl.generate as generate_module
import torch_ref.generate
import torch_ref.model
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.runs.run_folder import write_sealed
from data.testing import Result, call, refused, save_model
from data.text.sampling import Sampler
from data.text.tokenizer import EOT, VOCAB_SIZE, gpt2, tokenizer
from tinygrad_impl.backend import Backend, Plain
from tinygrad_impl.cached_model import CachedModel
from tinygrad_impl.generate import CHUNK, Drawn, Generator, backend_for, encode, main, pieces, setup
from tinygrad_impl.model import GPT2, KVCache
from tinygrad_impl.tests.support import SURE, by_torch, save_sure_model, seen

PROMPT, OTHER = "Once upon a time", "The dog"
LONG = PROMPT + 6 * ", once upon a time"  # of more tokens than the context has
V = 61  # of what is tested without the program, and three more that the model has
SMALLER = GPT2Config(vocab_size=V + 3, n_layer=1, n_head=2, n_embd=16, n_positions=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sure_model(tmp_path_factory.mktemp("sure"))


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(GPT2(SMALLER, initial_weights(SMALLER, 1, 0.3)), V=V, eot=60)


def generate(folder: Path, *options: object) -> Result:
    result = call(main, "--model", folder, "--device", "CPU", *options, cwd=folder)
    assert result.code == 0, result
    return result


def split(out: str) -> list[str]:
    return out.removesuffix("\n").split("\n\n---\n")


def recorded(asked: list[Any], answer: Any) -> Callable[[Any], Any]:
    """A function that keeps what it is asked."""

    def answered(question: Any) -> Any:
        asked.append(question)
        return answer

    return answered


class Scripted(Sampler):
    """Draws what it is told to, a row of tokens a call, whatever the logits."""

    def __init__(self, *calls: list[int]):
        super().__init__()
        self.calls = iter(calls)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return np.array(next(self.calls))


class Witness:
    """Takes a generator's place in the program and keeps what it was given. Writes " 0", " 1", ... after prompts."""

    def __init__(self, model: GPT2, backend: Backend, V: int, eot: int, name: str):
        self.model, self.backend, self.V, self.eot, self.name = model, backend, V, eot, name

    def __call__(
        self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, tick: Callable[[], object] = int
    ) -> list[list[int]]:
        self.prompts, self.max_new_tokens, self.sampler = prompts, max_new_tokens, sampler
        return [encode(gpt2(), f" {i}") for i in range(len(prompts))]

    def stream(self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler) -> Iterator[list[Drawn | None]]:
        yield [(token, 0.5) for token in self(prompts, max_new_tokens, sampler)[0]]


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> list[Witness]:
    """The generators that the program has made."""
    made: list[Witness] = []

    def make(*arguments: Any) -> Witness:
        made.append(Witness(*arguments))
        return made[-1]

    monkeypatch.setattr(generate_module, "Generator", make)
    return made


ALL = {"--temperature": 1.7, "--top-k": 37, "--top-p": 0.9, "--seed": 6, "--max-new-tokens": 12}


@pytest.mark.parametrize("left_out", [None, *ALL])
def test_every_option_takes_part(left_out: str | None, folder: Path, texts: list[str]) -> None:
    """The texts are those of the reference's logits and these settings, and of these only."""
    options = ALL if left_out is None else {name: value for name, value in ALL.items() if name != left_out}
    given: list[Any] = [
        options.get(name, default) for name, default in zip(ALL, (0.6, 40, None, 1337, 160), strict=True)
    ]
    *settings, new = given
    expected = by_torch(folder, [PROMPT, OTHER], min(new, 13), Sampler(*settings))
    assert (texts == expected) == (left_out is None)
    assert len(encode(gpt2(), texts[0])) < len(encode(gpt2(), PROMPT)) + 12  # it ends there, and the other goes on


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[str]:
    options = [word for option in ALL.items() for word in option]
    return split(generate(folder, "--prompt", PROMPT, "--prompt", OTHER, *options).out)


@pytest.fixture(scope="module")
def streamed(folder: Path) -> Result:
    """One text, without options of sampling."""
    return generate(folder, "--prompt", LONG, "--max-new-tokens", 24)


def test_one_text_is_that_of_the_references_logits(folder: Path, streamed: Result) -> None:
    """Beyond the context, and it says so; as samples of training unless told otherwise."""
    [text] = by_torch(folder, [LONG], 24, Sampler(0.6, 40, None, 1337))
    assert streamed.out == text + "\n"
    assert SURE.n_positions < len(encode(gpt2(), LONG)) < len(encode(gpt2(), text)) < len(encode(gpt2(), LONG)) + 24
    computed, note, last = streamed.err.splitlines()
    cores = len(os.sched_getaffinity(0))
    assert computed == f"{folder}, 0.8M parameters; CPU with {cores} cores, float32, plain kernels"
    assert note == "note: a text of more than 32 tokens goes on from its last 16"
    assert last == "compiling before the first token"


def test_as_a_program(folder: Path, streamed: Result) -> None:
    """What only a process of its own shows: the module runs, and stdout has the text and nothing else."""
    command = [sys.executable, "-m", "tinygrad_impl.generate", "--model", str(folder), "--prompt", LONG]
    command += ["--device", "CPU", "--max-new-tokens", "24"]
    root = Path(tinygrad_impl.__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=os.environ | {"DEV": ""}, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (streamed.out, streamed.err)


def test_without_options(folder: Path, witness: list[Witness]) -> None:
    assert generate(folder).out == "Once upon a time 0\n"
    [made] = witness
    assert made.prompts == [encode(gpt2(), "Once upon a time")]
    assert made.max_new_tokens == 160
    assert (made.sampler.temperature, made.sampler.top_k, made.sampler.top_p) == (0.6, 40, None)
    assert made.sampler.random.random() == np.random.Generator(np.random.PCG64(1337)).random()
    assert made.backend == Plain()
    for name, array in load(folder)[1].items():
        np.testing.assert_array_equal(made.model.arrays()[name], array)


def test_many_prompts(folder: Path, witness: list[Witness]) -> None:
    """As one batch, in the order given, each as many times as asked for."""
    result = generate(folder, "--prompt", "A", "--prompt", "", "--num-samples", 3, "--max-new-tokens", 7)
    assert result.out == "\n\n---\n".join(["A 0", "A 1", "A 2", " 3", " 4", " 5"]) + "\n"
    assert witness[0].prompts == [encode(gpt2(), "A")] * 3 + [[EOT]] * 3
    assert split(generate(folder, "--prompt", "A", "--num-samples", 2).out) == ["A 0", "A 1"]


@pytest.mark.usefixtures("witness")
def test_when_a_text_may_outgrow_the_context(folder: Path) -> None:
    """By the longest prompt, and from the first token on that does not fit."""
    tokens = len(encode(gpt2(), PROMPT))
    for more, notes in ((0, 0), (1, 1)):
        new = SURE.n_positions - tokens + more
        result = generate(folder, "--prompt", "A", "--prompt", PROMPT, "--prompt", "", "--max-new-tokens", new)
        assert result.err.count("note: ") == notes


def test_bfloat16_and_what_it_says(folder: Path, witness: list[Witness]) -> None:
    line = generate(folder, "--dtype", "bfloat16").err.splitlines()[0]
    assert line.endswith("cores, bfloat16, plain kernels")
    assert witness[0].backend == Plain(dtypes.bfloat16)
    line = generate(folder, "--dtype", "float32").err.splitlines()[0]
    assert line.endswith("cores, float32, plain kernels")
    assert witness[1].backend == Plain()
    fused: Any = SimpleNamespace(name="fused", dtype=dtypes.bfloat16)
    gpt2 = setup("gpt2", GPT2Config(), "METAL", fused)
    assert gpt2 == "gpt2, 124.4M parameters; METAL, bfloat16, fused kernels"


def test_the_backend_is_chosen_by_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is the GPU's default, and what has kernels."""
    asked: list[tuple[Any, ...]] = []

    def choose(*arguments: Any, bfloat16: bool) -> str:
        asked.append((*arguments, bfloat16))
        return "kernels"

    monkeypatch.setattr(generate_module, "choose", choose)
    for dtype, device in ((None, "CPU"), ("float32", "CUDA")):
        assert backend_for(dtype, SURE, device) == Plain()
    assert asked == []
    assert backend_for(None, SURE, "CUDA") == backend_for("bfloat16", SURE, "METAL") == "kernels"
    assert asked == [("auto", SURE, device, True) for device in ("CUDA", "METAL")]


def test_the_device_is_the_one_asked_for(folder: Path, witness: list[Witness], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(generate_module, "open_device", recorded(asked, "METAL"))
    assert call(main, "--model", folder, cwd=folder).err.splitlines()[0].endswith("; METAL, float32, plain kernels")
    assert "METAL" in call(main, "--model", folder, "--device", "metal", cwd=folder).err
    assert asked == [None, "metal"]
    assert len(witness) == 2


def test_a_run_is_its_latest_checkpoint(folder: Path, witness: list[Witness], tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    small = GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8)
    for step in (0, 5, 10):
        save_model(checkpoints / f"step-{step}", small, seed=step)
    (checkpoints / "latest").write_text("step-5\n")
    assert generate(tmp_path / "run", "--max-new-tokens", 1).code == 0
    np.testing.assert_array_equal(witness[0].model.wte.weight.numpy(), load(checkpoints / "step-5")[1]["wte.weight"])


def test_a_run_writes_as_its_samples(folder: Path, witness: list[Witness], tmp_path: Path) -> None:
    """Unless told otherwise; a run of an older version, which says no more than its seed, and a checkpoint as well."""
    shutil.copytree(folder, tmp_path / "run" / "checkpoints" / "step-5")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-5\n")
    said: dict[str, Any] = {"sampling": {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "seed": 5, "max_new_tokens": 6}}
    for content, words, expected in (
        (said, (), (0.3, 7, 0.8, 5, 6)),
        (said, ("--top-k", 0, "--temperature", 0, "--seed", 0), (0, None, 0.8, 0, 6)),
        ({"seed": 8}, (), (0.6, 40, None, 8, 160)),
    ):
        write_sealed(tmp_path / "run" / "run.json", content)
        generate(tmp_path / "run", *words)
        sampler, new = witness[-1].sampler, witness[-1].max_new_tokens
        first = np.random.Generator(np.random.PCG64(expected[3])).random()
        assert (sampler.temperature, sampler.top_k, sampler.top_p, new) == (*expected[:3], expected[4])
        assert sampler.random.random() == first
    write_sealed(tmp_path / "run" / "run.json", said)
    for checkpoint in ("step-5", "latest"):
        result = call(main, "--model", f"run/checkpoints/{checkpoint}", "--device", "CPU", cwd=tmp_path)
        assert result.code == 0, result
        assert (witness[-1].max_new_tokens, witness[-1].sampler.top_k) == (6, 7)
    write_sealed(tmp_path / "run" / "run.json", {"sampling": {"temperature": 0.3}})
    refused(
        call(main, "--model", "run", cwd=tmp_path),
        "run/run.json is of another version",
        "copy a checkpoint out of it",
    )


def test_it_stays_within_what_was_trained(folder: Path, witness: list[Witness], tmp_path: Path) -> None:
    """And says so; the reference's generator does it too."""
    config, arrays = load(folder)
    save(tmp_path, replace(config, trained_positions=9), arrays, gpt2())
    note = "note: a text of more than 9 tokens goes on from its last 4; of its 32 positions the others are untrained"
    for new, notes in ((5, []), (6, [note])):
        assert generate(tmp_path, "--prompt", PROMPT, "--max-new-tokens", new).err.splitlines()[1:-1] == notes
    assert witness[0].model.config.context == 9
    model, sampler = torch_ref.model.GPT2(*load(tmp_path)), Sampler(0.6, seed=3)
    [new_tokens] = torch_ref.generate.generate(model, [encode(gpt2(), PROMPT)], 12, sampler, VOCAB_SIZE, EOT)
    assert PROMPT + tokenizer().decode(new_tokens) == by_torch(tmp_path, [PROMPT], 12, Sampler(0.6, seed=3))[0]


def test_float64_weights_are_computed_in_float32(tmp_path: Path, witness: list[Witness]) -> None:
    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8)
    save(tmp_path / "double", config, {n: a.astype(np.float64) for n, a in initial_weights(config, 1).items()})
    generate(tmp_path / "double")
    assert witness[0].model.wte.weight.dtype == dtypes.float32


class Mirror:
    """Takes a cached model's place: its next token says what it has seen. It draws as many at a time as it may."""

    def __init__(self, N: int, n_positions: int):
        self.slots = np.full((N, n_positions), -1)
        self.log: list[tuple[int, int]] = []  # lengths that it was given, and `most`

    def put(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        for row, new, length in zip(self.slots, tokens, lengths, strict=True):
            for slot, token in enumerate(new[: len(row) - length], length):
                row[slot] = token

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        assert tokens.dtype == lengths.dtype == np.int32
        assert 1 <= tokens.shape[1] <= 3
        assert len(tokens) == len(self.slots)
        self.put(tokens, lengths)

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.log.append((int(lengths.max()), most))
        for step in range(most):
            self.put(tokens[:, None], lengths + step)
            windows = [row[: length + step + 1].tolist() for row, length in zip(self.slots, lengths, strict=True)]
            tokens = np.array([follower(window) for window in windows])
            yield tokens, tokens / 1000


def follower(window: list[int]) -> int:
    return (len(window) + sum(i * token for i, token in enumerate(window, 1))) % 97 or EOT


@pytest.mark.parametrize(("n_positions", "trained"), [(1, None), (2, None), (3, None), (7, None), (12, None), (12, 7)])
def test_what_each_token_is_drawn_from(n_positions: int, trained: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of every row follows from what the row sees then, in chunks of any fill, beyond the context, and
    where other rows have ended; what draws many at a time is never asked for one that does not fit, or too many.
    """
    monkeypatch.setattr(generate_module, "CHUNK", 3)
    config = GPT2Config(vocab_size=V, n_layer=1, n_head=1, n_embd=4, n_positions=n_positions, trained_positions=trained)
    random = np.random.default_rng(n_positions)
    n_positions = trained or n_positions  # what was not trained is never seen
    ends = 0
    for sizes, new in (((1, 4, 9), 40), ((3,), 5), ((7, 2), 1), ((12, 13, 30, 1), 61)):
        generator = Generator(GPT2(config, initial_weights(config, 0)), V=V, eot=EOT)
        mirror = Mirror(len(sizes), n_positions)
        monkeypatch.setattr(generator, "decoder", lambda N, mirror=mirror: mirror)
        prompts = [random.integers(0, 97, size).tolist() for size in sizes]
        steps = list(generator.stream(prompts, new, Sampler()))
        expected = []
        for prompt in prompts:
            row, given, token = list(prompt), len(prompt), 0
            while len(row) < given + new and token != EOT:
                token = follower(row[-seen(n_positions, given, len(row)) :])
                row += [token] if token != EOT else []
            expected.append(row[given:])
        ends += sum(len(row) < new for row in expected)
        assert len(steps) == max(map(len, expected))
        for i, tokens in enumerate(expected):
            assert [step[i] for step in steps] == [(t, t / 1000) for t in tokens] + [None] * (len(steps) - len(tokens))
        assert all(0 < most <= min(new, n_positions - held) for held, most in mirror.log)
        # in as few calls as contexts can be filled in
        assert len(mirror.log) <= 1 + len(sizes) * (1 + new // (n_positions - n_positions // 2))
    assert ends


def test_a_row_ends_before_the_end_of_text(generator: Generator) -> None:
    # the first row ends first, and what is drawn for it later must not appear; no fourth call is made
    sampler = Scripted([5, 6], [60, 7], [8, 60])
    assert generator([[1, 2, 3]] * 2, 6, sampler) == [[5], [6, 7]]
    assert next(sampler.calls, None) is None


def test_it_stops_after_max_new_tokens(generator: Generator) -> None:
    assert generator([[1], [2, 3]], 2, Scripted([4, 5], [6, 7])) == [[4, 6], [5, 7]]


def test_a_row_does_not_depend_on_the_others(generator: Generator) -> None:
    prompts = [[1, 2, 3, 4, 5], [9]]
    greedy = Sampler(temperature=0)
    together = generator(prompts, 4, greedy)
    assert together == [generator([prompt], 4, greedy)[0] for prompt in prompts]
    assert together[0] != together[1]


def test_beyond_the_context_it_goes_on_from_the_last_half(generator: Generator) -> None:
    n = SMALLER.n_positions
    prompt = np.random.default_rng(0).integers(0, V, 2 * n).tolist()
    greedy = Sampler(temperature=0)
    half = n // 2
    new = generator([prompt], half + 3, greedy)[0]
    assert len(new) == half + 3
    assert new == generator([prompt[-half:]], half + 3, greedy)[0]  # the context is full, and slides, on the way
    assert new[-2:] == generator([(prompt + new[:-2])[-half:]], 2, greedy)[0]


@torch.no_grad()
def test_bfloat16_products(generator: Generator) -> None:
    """Probabilities are the reference's, but for the rounding to 8 bits."""
    half = Generator(generator.model, Plain(dtypes.bfloat16), V=V)
    steps = []
    for each in (half, generator):
        drawn = each.stream([[1, 2, 3]], 4, Scripted([4], [5], [6], [7]))
        steps.append([row[1] for [row] in drawn if row])
    reference = torch_ref.model.GPT2(SMALLER, generator.model.arrays())
    logits = reference(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0][0, 2:, :V].double()
    expected = logits.softmax(-1)[range(4), [4, 5, 6, 7]].numpy()
    assert steps[1] == pytest.approx(expected, rel=1e-4)
    assert steps[0] == pytest.approx(expected, rel=0.1)
    assert all(abs(p - exact) > 1e-4 * exact for p, exact in zip(steps[0], expected, strict=True))


def test_a_model_that_gives_no_number_is_named() -> None:
    """Token 0 would be drawn for ever. Whoever wants to see what it gives names no model."""
    arrays = initial_weights(SMALLER, 1)
    arrays["ln_f.bias"][0] = np.nan
    model = GPT2(SMALLER, arrays)
    assert Generator(model, V=V)([[1]], 2, Sampler(0)) == [[0, 0]]
    with pytest.raises(generate_module.InputError, match=r"^what a/model computes is not a number"):
        list(Generator(model, V=V, eot=0, name="a/model").stream([[1]], 2, Sampler(0)))


@pytest.mark.parametrize("more", [0, 1])
def test_the_model_has_to_have_what_is_drawn_from(more: int) -> None:
    config = GPT2Config(vocab_size=9, n_layer=1, n_head=1, n_embd=4, n_positions=8)
    model = GPT2(config, initial_weights(config, 1))
    if more:
        with pytest.raises(generate_module.InputError, match="the model has 9 tokens, the tokenizer 10; choose"):
            Generator(model, V=9 + more)
    else:
        Generator(model, V=9)


def test_a_model_of_fewer_tokens_than_the_tokenizer(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB_SIZE - 1, n_layer=1, n_head=1, n_embd=4, n_positions=8)
    save_model(tmp_path / "other", config)
    for name, text in gpt2().files().items():
        (tmp_path / "other" / name).write_text(text, encoding="utf-8")
    refused(call(main, "--model", tmp_path / "other", cwd=tmp_path), "has 50256 tokens, the tokenizer 50257; put the")


def test_a_prompt_cannot_smuggle_in_the_end_of_text() -> None:
    assert EOT not in encode(gpt2(), "<|endoftext|>")


def test_nothing_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's code runs in the first two calls of a graph; then no length of prompt or text makes it run again."""
    calls: list[int] = []
    hidden = GPT2.hidden

    def counted(self: GPT2, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        calls.append(tokens.shape[1])
        return hidden(self, tokens, cache)

    monkeypatch.setattr(GPT2, "hidden", counted)
    # of any device, which has graphs
    generator = Generator(GPT2(SMALLER, initial_weights(SMALLER, 1)), Plain(dtypes.float32), V)
    for prompt in ([1, 2], [3, 4, 5]):
        generator([prompt], 2, Scripted([6], [7]))
    assert sorted(calls) == [1, 1, CHUNK, CHUNK]
    long = list(range(2 * SMALLER.n_positions))
    first = generator([long], 2 * SMALLER.n_positions, Sampler(seed=1))
    assert generator([[8]], 1, Scripted([9])) == [[9]]
    assert generator([long], 2 * SMALLER.n_positions, Sampler(seed=1)) == first
    assert len(calls) == 4


def test_a_token_is_computed_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, all but its last token, and every new token alone."""
    monkeypatch.setattr(generate_module, "CHUNK", 5)
    model = CachedModel(generator.model, Plain(), 1, 5, V)
    seen: list[tuple[int, list[int]]] = []

    def watched(graph: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[[Tensor, Tensor], Tensor | None]:
        def run(tokens: Tensor, lengths: Tensor) -> Tensor | None:
            seen.append((lengths.item(), tokens.tolist()[0]))
            return graph(tokens, lengths)

        return run

    model.prefill, model.decode = watched(model._prefill), watched(model._decode)
    monkeypatch.setattr(generator, "_decoders", {1: model})
    generator([[1, 2, 3, 4, 5, 6, 7, 8]], 3, Scripted([9], [10], [11]))
    chunks = [(0, [1, 2, 3, 4, 5]), (5, [6, 7, 0, 0, 0])]
    assert seen == [*chunks, (7, [8]), (8, [9]), (9, [10])]


def test_probabilities_are_the_models_own(generator: Generator) -> None:
    """Whatever temperature, top-k and top-p make of them; by the reference, without a cache."""
    reference = torch_ref.model.GPT2(SMALLER, generator.model.arrays())
    prompts = [[1, 2, 3], [4]]
    steps = list(generator.stream(prompts, 3, Sampler(0.5, 5, 0.9, seed=2)))
    assert len(steps) == 3
    for i, row in enumerate(prompts):
        for step in steps:
            drawn = step[i]
            assert drawn
            token, probability = drawn
            with torch.no_grad():
                p = reference(torch.tensor([row]))[0][0, -1, :V].softmax(-1)
            assert probability == pytest.approx(p[token].item(), rel=1e-4)
            row.append(token)


def test_a_stream_says_which_rows_have_ended(generator: Generator) -> None:
    steps = list(generator.stream([[1], [2]], 6, Scripted([5, 6], [60, 7], [8, 60])))
    assert [[drawn and drawn[0] for drawn in step] for step in steps] == [[5, 6], [None, 7]]
    assert all(0 < drawn[1] < 1 for step in steps for drawn in step if drawn)


def test_pieces_are_whole_characters() -> None:
    text = "naïve 🙂日本"
    tokens = tokenizer().encode_ordinary(text)
    assert any("\ufffd" in tokenizer().decode([token]) for token in tokens)  # a character is split
    found = list(pieces(gpt2(), [], ((token, 0.5) for token in tokens)))
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
        assert "".join(
            piece for piece, _ in pieces(gpt2(), [], ((token, 1.0) for token in tokens))
        ) == tokenizer().decode(tokens)


def test_one_text_is_written_as_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result = call(main, "--model", folder, "--device", "CPU", "--prompt", PROMPT, cwd=folder)
    assert result.code == 130
    assert result.out == f"{PROMPT} a 🦙"
    assert shown[:2] == [PROMPT, f"{PROMPT} a"]
    assert len(shown) == len(new) > 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--num-samples", "two"], "--num-samples"),
        (["--temperature", -1], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", -1], "--top-k"),
        (["--top-p", 0], "--top-p"),
        (["--top-p", 1.5], "argument --top-p: 1.5 is not a number above 0 and at most 1; see `"),
        (["--seed", -1], "--seed"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--dtype", "float16"], "--dtype"),
        (["--tempo", 1], "--tempo"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_bad_options(options: list[object], word: str, folder: Path) -> None:
    refused(call(main, "--model", folder, *options, cwd=folder), word)


def test_no_model_is_named(tmp_path: Path) -> None:
    refused(call(main, cwd=tmp_path), "--model")


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    refused(call(main, "--model", tmp_path, cwd=tmp_path), "no checkpoint yet")
