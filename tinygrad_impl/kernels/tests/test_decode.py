"""Generation by kernels: the logits against float64 and PyTorch's bfloat16, the tokens against `Sampler`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import torch_ref.model
from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from parity_tests.weights import random_weights
from tinygrad_impl.internals import contents
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU

from tinygrad_impl import generate  # isort: skip: after the support
from tinygrad_impl.kernels import GPU, decode, draw, launch  # isort: skip
from tinygrad_impl.kernels.fused import Fused  # isort: skip
from tinygrad_impl.model import GPT2  # isort: skip
from tinygrad_impl.trainer import Trainer  # isort: skip

V = 100
V2 = 300  # in several blocks
CONFIG = GPT2Config(vocab_size=V, n_layer=1, n_head=1, n_embd=64, n_positions=8)


pytestmark = pytest.mark.usefixtures("device")


def close_to_torch(
    ours: list[np.ndarray], places: list[np.ndarray], config: GPT2Config, arrays: dict[str, np.ndarray], x: np.ndarray
) -> None:
    """The logits (N, V) after as many tokens of x (N, P) as `places` say, and one: their error is at most that of
    PyTorch's autocast, whose stream is float32 too but not its logits; of no row is it far larger.
    """
    doubles = {name: array.astype(np.float64) for name, array in arrays.items()}
    exact, own = (torch_ref.model.GPT2(config, a).to(DEVICE) for a in (doubles, arrays))
    tokens = torch.tensor(x, device=DEVICE)
    with torch.no_grad():
        truth = exact(tokens)[0].cpu().numpy()
        with torch.autocast(DEVICE, torch.bfloat16):
            theirs = own(tokens)[0].double().cpu().numpy()

    def errors(found: list[np.ndarray]) -> np.ndarray:
        pairs = [(logits - truth[rows, place], truth[rows, place]) for logits, place in zip(found, places, strict=True)]
        return np.concatenate([np.linalg.norm(error, axis=1) / np.linalg.norm(true, axis=1) for error, true in pairs])

    rows = np.arange(len(x))
    got, torchs = errors(ours), errors([theirs[rows, place] for place in places])
    assert np.mean(got**2) <= np.mean(torchs**2)
    assert got.max() <= 1.25 * torchs.max()


# N, layers, width, heads, n_positions, tokens of a prompt at a time, tokens in the cache, steps, layer norm's epsilon:
# where the tiles of rows change; for one row and for some, blocks of the cache before which, in which and with which
# the last position is; several steps of the sums over the width
LOGITS = [
    (1, 1, 64, 4, 131, 70, 127, 4, 1e-5),
    (2, 3, 64, 1, 3, 3, 2, 1, 1e-5),
    (3, 1, 64, 4, 131, 66, 128, 3, 1e-3),
    (5, 1, 192, 3, 4, 2, 3, 1, 0.1),
    (17, 1, 64, 2, 4, 3, 1, 1, 1e-5),
    (33, 1, 64, 2, 4, 3, 1, 1, 1e-5),
    (64, 1, 64, 2, 4, 3, 1, 1, 1e-5),
    (65, 1, 64, 2, 4, 3, 1, 1, 1e-3),
    (70, 1, 128, 2, 3, 3, 1, 1, 1e-5),
]
if DEVICE == "cuda":
    LOGITS.append((2, 12, 768, 12, 300, 32, 296, 4, 1e-5))  # of GPT-2's depth
    LOGITS += [(N, 2, 768, 12, 300, 32, 296, 4, 1e-5) for N in (1, 3, 5, 17, 33, 64, 65, 70, 130)]


@pytest.mark.parametrize(
    ("N", "variant"),
    [
        (1, {"activation_function": "gelu", "n_inner": 192, "tie_word_embeddings": False}),
        (2, {"activation_function": "relu", "n_inner": 64}),
    ],
)
def test_logits_of_variants(N: int, variant: dict[str, Any]) -> None:
    test_logits(N, 1, 64, 2, 4, 3, 2, 2, 1e-5, **variant)


@pytest.mark.parametrize(("N", "layers", "width", "heads", "P", "chunk", "held", "steps", "eps"), LOGITS)
def test_logits(
    N: int, layers: int, width: int, heads: int, P: int, chunk: int, held: int, steps: int, eps: float, **variant: Any
) -> None:
    """Of rows of different lengths, each to the last position. What the cache has after them is of other tokens."""
    config = GPT2Config(V2, P, width, layers, heads, layer_norm_epsilon=eps, **variant)
    arrays = random_weights(config, 0, 0.8 / width**0.5)
    for name in ("wte.weight", "wpe.weight"):
        arrays[name] *= 4  # a large stream, whose rounding would show
    for layer in range(layers):
        arrays[f"h.{layer}.attn.c_attn.weight"][:, : 2 * width] *= 3  # some keys matter far more than others
    arrays["wte.weight"][V2 // 2 :] = arrays["wte.weight"][: V2 // 2]  # each logit is there twice, in different blocks
    decoder = decode.Decoder(GPT2(config, arrays), Fused(THIS_GPU), N, chunk, V2)
    tokens, rows = np.random.default_rng(N).integers(0, V2, (N, P)).astype(np.int32), np.arange(N, dtype=np.int32)
    places = [np.minimum((rows + held) % P if N > 3 else held - rows % 3 + step, P - 1) for step in range(steps)]
    prompt = np.where(np.arange(P) < places[0][:, None], tokens, tokens[:, ::-1])
    prompt = np.pad(prompt, ((0, 0), (0, -P % chunk)), constant_values=1)
    for start in range(0, P, chunk):
        decoder.add(prompt[:, start : start + chunk], np.full(N, start, np.int32))
    found = []
    for place in places:
        drawn, chances = decoder.run(tokens[rows, place], place, 1, Sampler(0))
        found.append(logits := contents(decoder.logits))
        assert drawn[0].tolist() == logits.argmax(1).tolist()
        expected = [probability(*row) for row in zip(logits, drawn[0], strict=True)]
        np.testing.assert_allclose(chances[0], expected, rtol=1e-5)
    close_to_torch(found, places, config, arrays, tokens)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "SORTED", 64)  # several of so few tokens


def test_programs_of_a_large_model_are_narrower() -> None:
    """Where those of 32 columns would not all run at once."""
    for width, columns in ((1280, 32), (1600, 16)):
        k = decode.Launches(GPU(90, 132), GPT2Config(n_embd=width, n_head=width // 64), 1, 1, 50257)
        assert (k.qkv.constants["BN"], k.expand.constants["BN"]) == (columns, columns)


def drawn_by_kernels(logits: np.ndarray, settings: list[float], numbers: np.ndarray) -> np.ndarray:
    """The tokens drawn from logits (N, V) with numbers (N,)."""
    N, V = logits.shape
    k = decode.Launches(THIS_GPU, GPT2Config(vocab_size=V), N, 1, V)
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
    keys = torch.zeros(N, parts, draw.SORTED, dtype=torch.int64, device=DEVICE)
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


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return random_weights(CONFIG, 1, 0.2)


@pytest.fixture(scope="module")
def generator(device: None, arrays: dict[str, np.ndarray]) -> Iterator[generate.Generator]:
    """Of `CONFIG`, which takes few tokens at a time, and sorts them in two parts. The model has more than are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "CHUNK", 4)
        patch.setattr(Fused, "prompt_tokens", 0)
        patch.setattr(decode, "STEPS", 3)
        patch.setattr(draw, "SORTED", 64)
        yield generate.Generator(GPT2(CONFIG, arrays), Fused(THIS_GPU), V - 10)


@pytest.mark.parametrize(("N", "chunk"), [(1, 8), (2, 6), (4, 4)])
def test_how_many_tokens_of_a_prompt_at_a_time(
    monkeypatch: pytest.MonkeyPatch, device: None, N: int, chunk: int
) -> None:
    """So many of all prompts as the backend wants, at least CHUNK of each, and no more than the context has."""
    monkeypatch.setattr(generate, "CHUNK", 4)
    monkeypatch.setattr(Fused, "prompt_tokens", 12)
    generator = generate.Generator(GPT2(CONFIG, random_weights(CONFIG, 1)), Fused(THIS_GPU))
    assert generator.chunk(N) == chunk
    assert generator.decoder(N).prompt.shape == (N, chunk)  # type: ignore[attr-defined]


class Watching(Sampler):
    """One that may draw otherwise than its settings say, so that it has to see the logits; it counts how often."""

    seen = 0

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        self.seen += 1
        return super().__call__(logits)


PROMPTS = [[1, 2], [9]]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "top_k": 9, "seed": 1},
    {"temperature": 2.5, "top_p": 0.8, "seed": 2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.7, "seed": 4},
]


def by_reference(
    arrays: dict[str, np.ndarray], drawn: np.ndarray, sampler: Sampler
) -> tuple[np.ndarray, list[list[float]]]:
    """After `PROMPTS` and what has been drawn (steps, N) before each step: what the reference and the host's sampler
    draw in float64, and the probabilities of what has been drawn.
    """
    exact = torch_ref.model.GPT2(CONFIG, {name: array.astype(np.float64) for name, array in arrays.items()})
    tokens, chances = [], []
    for step, given in enumerate(drawn):
        texts = [[*prompt, *before] for prompt, before in zip(PROMPTS, drawn[:step].T.tolist(), strict=True)]
        with torch.no_grad():
            logits = np.stack([exact(torch.tensor([text]))[0][0, -1, : V - 10].numpy() for text in texts])
        tokens.append(sampler(logits))
        chances.append([probability(row, token) for row, token in zip(logits, given, strict=True)])
    return np.array(tokens), chances


@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_are_those_of_the_reference(
    generator: generate.Generator, arrays: dict[str, np.ndarray], settings: dict[str, Any]
) -> None:
    """Two rows of different lengths, in several bursts, until the context of the longer is full; by the numbers that
    the sampler has for each row and step, which are used up then. Rounding may change some of the 14 tokens.
    """
    ours, host = Sampler(**settings), Sampler(**settings)
    steps = [[drawn for drawn in step if drawn] for step in generator.stream(PROMPTS, 7, ours)]
    tokens = np.array([[token for token, _ in step] for step in steps])
    expected, chances = by_reference(arrays, tokens, host)
    assert (tokens == expected).sum() >= 11, (tokens.T, expected.T)
    np.testing.assert_allclose([[p for _, p in step] for step in steps], chances, rtol=0.1)
    assert ours.random.random() == host.random.random()


@pytest.mark.parametrize("settings", SETTINGS[2:])
def test_texts_beyond_the_context(generator: generate.Generator, settings: dict[str, Any]) -> None:
    """They are those of a sampler on the host that sees the logits of each step, and as many numbers are used up."""
    ours, host = Sampler(**settings), Watching(**settings)
    prompts = [[1, 2, 3, 4, 5, 6], [9]]
    new = generator(prompts, 5, ours)
    assert new == generator(prompts, 5, host)
    assert host.seen == 5
    assert [len(row) for row in new] == [5, 5]
    assert ours.random.random() == host.random.random()


@pytest.mark.skipif(DEVICE == "cuda", reason="a compiled kernel has its constants")
def test_the_host_draws_what_is_uncertain(generator: generate.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a burst too, with the logits of that step and the numbers that it has."""
    expected = generator(PROMPTS, 6, Sampler(**SETTINGS[1]))
    monkeypatch.setattr(draw, "CLOSE", draw.tl.constexpr(0.03))
    decoder, certain = generator.decoder(2), list[Any]()
    assert isinstance(decoder, decode.Decoder)
    finish = decoder.finish

    def watched(count: int) -> tuple[np.ndarray, np.ndarray]:
        drawn, chances = finish(count)
        certain.append((drawn >= 0).all(1).tolist())
        return drawn, chances

    monkeypatch.setattr(decoder, "finish", watched)
    ours = Sampler(**SETTINGS[1])
    assert generator(PROMPTS, 6, ours) == expected
    assert [True, False] in [first[:2] for first in certain], certain
    host = Sampler(**SETTINGS[1])
    host.random.random((6, 2))
    assert ours.random.random() == host.random.random()


def test_a_row_ends_before_the_end_of_text(generator: generate.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of what the GPU draws by itself; the other row goes on."""
    first, second = generator(PROMPTS, 7, Sampler(0))
    ending = next(token for token in first[1:] if token not in second)
    monkeypatch.setattr(generator, "eot", ending)
    assert generator(PROMPTS, 7, Sampler(0)) == [first[: first.index(ending)], second]


def test_texts_follow_training(generator: generate.Generator, arrays: dict[str, np.ndarray]) -> None:
    """A generator with a trainer's backend reads the copies that its steps change, and those that `restore` does."""
    trainer = Trainer(CONFIG, arrays, backend=Fused(THIS_GPU))
    training = generate.Generator(trainer.model, trainer.backend, V - 10)
    before, moments = generator(PROMPTS, 2, Sampler(0)), trainer.moments()
    assert training(PROMPTS, 2, Sampler(0)) == before

    def changed() -> bool:
        found = np.array(training(PROMPTS, 2, Sampler(0))).T
        expected, _ = by_reference(trainer.model.arrays(), found, Sampler(0))
        return found.tolist() == expected.tolist() != np.array(before).T.tolist()

    x = np.array([[1, 2, 3, 4]], np.int32)
    trainer.step([(x, x[:, ::-1].copy())], 0.1)
    assert changed()
    for name in ("wte.weight", "h.0.mlp.c_proj.weight"):
        trainer.restore(arrays | {name: arrays[name][::-1].copy()}, moments, 0)
        assert changed(), name
    trainer.restore(arrays, moments, 0)
    assert training(PROMPTS, 2, Sampler(0)) == before


@pytest.mark.skipif(DEVICE == "cuda", reason="there they are one graph")
def test_how_many_kernels(generator: generate.Generator) -> None:
    decoder = generator.decoder(2)
    assert isinstance(decoder, decode.Decoder)
    for sampler, drawing in ((Sampler(0), 1), (Sampler(), 2)):
        decoder.run(np.array([1, 2], np.int32), np.array([0, 0], np.int32), 3, sampler)
        graph = decoder.sampled if sampler.temperature else decoder.greedy
        assert len(graph.captured.linear.src) == 1 + 5 * CONFIG.n_layer + 1 + drawing
