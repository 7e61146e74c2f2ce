"""Generation by kernels: the logits against float64 and PyTorch's bfloat16, the tokens against `Sampler`."""

from typing import Any

import numpy as np
import pytest
import torch

import torch_ref.model
from data.config import GPT2Config
from data.sampling import Sampler
from parity_tests.weights import random_weights
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error

from tinygrad_impl import generate  # isort: skip: after the support
from tinygrad_impl.kernels import decode, fused, launch  # isort: skip
from tinygrad_impl.model import GPT2  # isort: skip

V = 100
CONFIG = GPT2Config(vocab_size=V, n_layer=1, n_head=1, n_embd=64, n_positions=8)


pytestmark = pytest.mark.usefixtures("device")


def close_to_torch(ours: torch.Tensor, config: GPT2Config, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> None:
    """The logits (N, V) after tokens (N, T) have at most 1.5 times the error of those of PyTorch's autocast."""
    exact = torch_ref.model.GPT2(config, {name: array.astype(np.float64) for name, array in arrays.items()})
    model, x = torch_ref.model.GPT2(config, arrays), torch.tensor(tokens)
    with torch.no_grad():
        truth = exact(x)[0][:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(x)[0][:, -1].float()
    assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth)


@pytest.mark.parametrize(
    ("N", "layers", "width", "heads", "blocks"), [(1, 2, 64, 1, 3), (3, 1, 64, 4, 2), (18, 2, 64, 2, 1)]
)
def test_logits(N: int, layers: int, width: int, heads: int, blocks: int) -> None:
    """Of rows of different lengths, in several blocks of the cache; of one row, few and many."""
    held, chunk = (blocks - 1) * 64 + 3, (blocks - 1) * 32 + 2
    config = GPT2Config(vocab_size=V, n_layer=layers, n_head=heads, n_embd=width, n_positions=held + 5)
    arrays = random_weights(config, 0, 0.1)
    weights = decode.Weights(GPT2(config, arrays))
    weights.update()
    decoder = decode.Decoder(weights, N, chunk, V)
    tokens = np.random.default_rng(N).integers(0, V, (N, held + 1))
    lengths = held - np.arange(N) % 3
    for start in range(0, held, chunk):
        padded = np.pad(tokens[:, start : start + chunk], ((0, 0), (0, max(0, start + chunk - held - 1))))
        decoder.add(padded, np.full(N, start))
    drawn, chances = decoder.run(tokens[np.arange(N), lengths], lengths, 1, Sampler(0))
    logits = torch.tensor(decode.read(decoder.logits))
    assert drawn[0].tolist() == logits.argmax(1).tolist()
    expected = logits.double().softmax(1).max(1).values.numpy()
    np.testing.assert_allclose(chances[0], expected, rtol=1e-5)
    for length in set(lengths.tolist()):
        rows = lengths == length
        close_to_torch(logits[rows], config, arrays, tokens[rows, : length + 1])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SORTED", 64)  # several of so few tokens


def drawn_by_kernels(logits: np.ndarray, settings: list[float], numbers: np.ndarray) -> np.ndarray:
    """The tokens drawn from logits (N, V) with numbers (N,)."""
    N, V = logits.shape
    k = decode.Launches(GPT2Config(vocab_size=V), N, 1, V)
    blocks, parts = k.draw.constants["BLOCKS"], k.draw.constants["PARTS"]

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.array(values), dtype=dtype, device=DEVICE)

    def call(kernel: launch.Launch, *tensors: torch.Tensor) -> None:
        kernel.kernel[kernel.grid](*tensors, **kernel.constants, num_warps=kernel.warps, num_stages=kernel.stages)

    # what the head would give: only the largest of a row matters to what is drawn
    top, bits = logits.max(1), logits.max(1).view(np.int32).astype(np.int64)
    key = (np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + 0x7FFFFFFF - logits.argmax(1)
    best = tensor(np.repeat(key[:, None], blocks, 1), torch.int64)
    sums = tensor(
        np.repeat(np.exp(logits.astype(np.float64) - top[:, None]).sum(1)[:, None] / blocks, blocks, 1), torch.float32
    )
    keys = torch.zeros(N, parts, decode.SORTED, dtype=torch.int64, device=DEVICE)
    shares = torch.full(keys.shape, np.nan, dtype=torch.float64, device=DEVICE)
    state = [torch.zeros(N, dtype=torch.int32, device=DEVICE) for _ in range(3)]
    drawn, chances = tensor(np.full((1, N), -9), torch.int32), tensor(np.full((1, N), np.nan), torch.float32)
    wanted = tensor(settings, torch.float64)
    call(k.sort, keys, shares, tensor(logits, torch.float32), best, wanted)
    call(k.draw, *state, drawn, chances, best, sums, keys, shares, tensor(numbers[None], torch.float64), wanted)
    found = drawn[0].cpu().numpy()
    assert [s.tolist() for s in state[1:]] == [[1] * N] * 2
    sure = found >= 0
    odds = np.exp(logits.astype(np.float64) - top[:, None])
    expected = (odds / odds.sum(1, keepdims=True))[np.arange(N), found]
    np.testing.assert_allclose(chances[0].cpu().numpy()[sure], expected[sure], rtol=1e-5)
    return found


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.3, "top_k": 9}, {"top_k": 999, "top_p": 0.605}, {"top_k": 1}]
)
def test_tokens_are_those_of_the_sampler(settings: dict[str, Any]) -> None:
    """From flat and steep distributions, with many equal logits, zeros of either sign and tokens that cannot be."""
    logits = np.random.default_rng(0).standard_normal((6, V)).astype(np.float32)
    logits *= np.array([0.05, 1, 20, 1, 1, 1], np.float32)[:, None]
    logits[3] = np.round(logits[3])
    logits[4, ::2] = -np.inf
    logits[5] = np.where(np.arange(V) % 2, 0.0, -0.0)
    sampler = Sampler(**settings, seed=3)
    numbers = np.random.default_rng(3).random(6)
    sampler.random = type("Fixed", (), {"random": lambda self, n: numbers})()
    wanted = [sampler.temperature, sampler.top_k or 0, sampler.top_p or 1]
    assert drawn_by_kernels(logits, wanted, numbers).tolist() == sampler(logits).tolist()


@pytest.mark.usefixtures("parts")
def test_it_says_where_rounding_decides() -> None:
    """Of four equally likely tokens, at the borders between two: which one it is depends on the order of summation."""
    logits = np.zeros((5, 4), np.float32)
    numbers = np.array([0.25, 0.5 - 1e-12, 0.75 + 1e-12, 0.25 + 1e-10, 0.75 - 1e-10])
    assert drawn_by_kernels(logits, [1, 0, 1], numbers).tolist() == [-1, -1, -1, 1, 2]
    assert drawn_by_kernels(logits, [1, 0, 0.5], numbers).tolist() == [-1] * 5  # two tokens, or three


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Weights of `CONFIG`, the tokenizer's size and the end of text being made to fit."""
    monkeypatch.setattr(generate, "VOCAB_SIZE", V - 10)  # the model may have more
    monkeypatch.setattr(generate, "EOT", 7)
    monkeypatch.setattr(generate, "CHUNK", 4)
    monkeypatch.setattr(decode, "STEPS", 3)
    monkeypatch.setattr(decode, "SORTED", 128)
    return random_weights(CONFIG, 1, 0.2)


class Watching(Sampler):
    """One that is not known, so that it has to see the logits."""


PROMPTS = [[1, 2, 3, 4, 5, 6], [9]]


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [({"temperature": 0}, PROMPTS), ({"temperature": 1.5, "top_k": 9, "seed": 1}, PROMPTS[:1])],
)
def test_texts_are_those_of_the_sampler(
    arrays: dict[str, np.ndarray],
    settings: dict[str, Any],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the context too, and where it is uncertain what is drawn; and as many of its numbers are used up."""
    generator = generate.Generator(GPT2(CONFIG, arrays), kernels=fused, V=V - 10)
    ours, host = Sampler(**settings), Watching(**settings)
    new = generator(prompts, 5, ours)
    assert new == generator(prompts, 5, host)
    assert len(new[0]) == 5
    assert ours.random.random() == host.random.random()
    if DEVICE == "cpu" and ours.temperature:  # a compiled kernel has its constants
        monkeypatch.setattr(decode, "CLOSE", decode.tl.constexpr(0.03))
        decoder, certain = generator.cached(1), list[list[bool]]()
        assert isinstance(decoder, decode.Decoder)

        run = decoder.run

        def watched(*given: Any) -> tuple[np.ndarray, np.ndarray]:
            drawn, chances = run(*given)
            certain.append((drawn >= 0)[:, 0].tolist())
            return drawn, chances

        monkeypatch.setattr(decoder, "run", watched)
        assert generator(prompts, 5, Sampler(**settings)) == new
        assert [True, False] in [first[:2] for first in certain], certain  # in the middle of a burst


def test_a_row_ends_before_the_end_of_text(arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of what the GPU draws by itself; the other row goes on."""
    generator = generate.Generator(GPT2(CONFIG, arrays), kernels=fused, V=V - 10)
    monkeypatch.setattr(generate, "EOT", V)
    first, second = generator(PROMPTS, 8, Sampler(0))
    ending = next(token for token in first[1:] if token not in second)
    monkeypatch.setattr(generate, "EOT", ending)
    assert generator(PROMPTS, 8, Sampler(0)) == [first[: first.index(ending)], second]


def test_weights_that_have_changed(arrays: dict[str, np.ndarray]) -> None:
    """Training changes them between two texts."""
    model = GPT2(CONFIG, arrays)
    generator = generate.Generator(model, kernels=fused, V=V - 10)
    before = generator(PROMPTS[:1], 2, Sampler(0))
    weight = model.h[0].mlp.c_fc.weight
    weight.assign(-weight).realize()
    after = generator(PROMPTS[:1], 2, Sampler(0))
    assert before != after == generate.Generator(model, kernels=fused, V=V - 10)(PROMPTS[:1], 2, Sampler(0))


@pytest.mark.skipif(DEVICE == "cuda", reason="there they are one graph")
def test_how_many_kernels(arrays: dict[str, np.ndarray]) -> None:
    decoder = decode.Decoder(decode.Weights(GPT2(CONFIG, arrays)), 1, 4, V)
    for sampler, drawing in ((Sampler(0), 1), (Sampler(), 2)):
        decoder.run(np.array([1]), np.array([0]), 3, sampler)
        graph = decoder.sampled if sampler.temperature else decoder.greedy
        assert len(graph.captured.linear.src) == 1 + 5 * CONFIG.n_layer + 1 + drawing
