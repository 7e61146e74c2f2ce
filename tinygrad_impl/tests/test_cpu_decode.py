"""The CPU's decoder: its logits beside the reference's, and its bits, whoever computes them and beside whom."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tinygrad import Device, dtypes
from tinygrad.helpers import Context
from tinygrad.runtime.support.elf import elf_loader

import torch_ref.model
from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler
from parity_tests.weights import random_weights
from tinygrad_impl import internals
from tinygrad_impl.backend import Plain
from tinygrad_impl.cached_model import CachedModel
from tinygrad_impl.cpu_decode import ROWS, CPUDecoder, source
from tinygrad_impl.model import GPT2

pytestmark = pytest.mark.tuned

# more positions and columns than a sum has products, more columns than a unit has, and no multiples of vectors
CONFIG = GPT2Config(vocab_size=203, n_positions=150, n_embd=260, n_layer=2, n_head=4, layer_norm_epsilon=1e-2)
V = 200  # of them
VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation_function": "gelu", "n_inner": 30, "n_embd": 30, "n_head": 3},
    {"activation_function": "relu", "tie_word_embeddings": False, "n_embd": 30, "n_head": 1},
]
TOKENS = np.random.default_rng(0).integers(0, V, (3, CONFIG.n_positions)).astype(np.int32)


class Watched(Sampler):
    """Draws greedily, and keeps the logits (N, V) that it is given."""

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        self.logits = logits.copy()
        return super().__call__(logits)


def logits_of(decoder: Any, tokens: np.ndarray, lengths: list[int]) -> np.ndarray:
    """(N, V): those after the last of tokens (N, T), of which each row has so many in the cache before."""
    sampler = Watched(0)
    ((drawn, _),) = decoder.draw(tokens[:, -1], np.array(lengths, np.int32), 1, sampler)
    assert drawn.tolist() == sampler.logits.argmax(1).tolist()
    return sampler.logits


def made(variant: dict[str, Any], dtype: str) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    config = replace(CONFIG, **variant)
    weights = random_weights(config, 1, 0.6 / config.n_embd**0.5)
    for name in ("wte.weight", "wpe.weight"):
        weights[name] *= 4  # a large stream, whose rounding would show
    return config, {name: array.astype(dtype) for name, array in weights.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-13)])
def test_logits(variant: dict[str, Any], dtype: str, bound: float) -> None:
    """Of rows of different lengths, up to the last position, after prompts in chunks that end in padding; the cache has
    other tokens after theirs.
    """
    config, arrays = made(variant, dtype)
    decoder, P = CPUDecoder(GPT2(config, arrays), 3, V), config.n_positions
    for start in range(0, P, 40):  # more than ROWS in all rows together
        decoder.add(TOKENS[::-1, start : start + 40].copy(), np.full(3, start, np.int32))
    lengths, reference = [0, 59, P - 1], torch_ref.model.GPT2(config, {n: a.astype(float) for n, a in arrays.items()})
    for start in range(0, P, 40):
        held = np.array([min(start, length) for length in lengths], np.int32)
        window = np.minimum(held[:, None] + np.arange(40), P - 1)
        decoder.add(np.take_along_axis(TOKENS, window, 1), held)
    last = np.take_along_axis(TOKENS, np.array(lengths)[:, None], 1)
    found = logits_of(decoder, last, lengths)
    assert found.dtype == dtype
    for i, length in enumerate(lengths):
        with torch.no_grad():
            expected = reference(torch.tensor(TOKENS[i : i + 1, : length + 1]))[0][0, -1, :V].numpy()
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=bound * np.abs(expected).max())


def test_the_bits_are_the_same_for_any_threads_chunks_and_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time by one thread, and a prompt in a chunk of any size beside others, by several."""
    monkeypatch.setattr(internals, "threads", ThreadPoolExecutor(5))
    config, arrays = made({}, "float32")
    model, length = GPT2(config, arrays), 45
    alone = CPUDecoder(model, 1, V)
    with Context(NUM_CPU_THREADS=1):
        for t in range(length):
            alone.add(TOKENS[1:2, t : t + 1], np.array([t], np.int32))
        expected = logits_of(alone, TOKENS[1:2, length : length + 1], [length])[0]
    for cores, chunk in ((2, 45), (3, 15), (5, 7)):
        decoder = CPUDecoder(model, 3, V)
        with Context(NUM_CPU_THREADS=cores):
            for start in range(0, length, chunk):
                at = np.full(3, start, np.int32)
                decoder.add(TOKENS[:, start : min(start + chunk, length)], at)
            found = logits_of(decoder, TOKENS[:, length : length + 1], [length] * 3)[1]
        np.testing.assert_array_equal(found, expected)


def test_more_rows_than_are_computed_at_once() -> None:
    config, arrays = made(VARIANTS[2], "float32")
    model, N = GPT2(config, arrays), ROWS + 3
    decoder, few = CPUDecoder(model, N, V), CPUDecoder(model, 3, V)
    tokens = np.resize(TOKENS[:, :1], (N, 1))
    found, expected = logits_of(decoder, tokens, [0] * N), logits_of(few, tokens[:3], [0] * 3)
    np.testing.assert_array_equal(found, np.resize(expected, (N, V)))


def test_what_is_not_a_number_is_seen() -> None:
    config, arrays = made(VARIANTS[2], "float32")
    arrays["h.0.mlp.c_fc.bias"][3] = np.nan
    assert np.isnan(logits_of(CPUDecoder(GPT2(config, arrays), 1, V), TOKENS[:1, :1], [0])).all()


def test_the_program_calls_nothing_by_name() -> None:
    """tinygrad's loader would link what is near, and jump elsewhere where it is not."""
    for variant, dtype in ((VARIANTS[0], np.float32), (VARIANTS[1], np.float64)):
        binary = Device["CPU"].compiler.compile_cached(source(replace(CONFIG, **variant), V, np.dtype(dtype)))
        _, sections, _ = elf_loader(binary, link_libs=[])  # raises where a name is not defined
        assert next(section.name for section in sections if section.header.sh_flags & 4) == ".text"


def test_a_phase_waits_for_what_others_have_begun() -> None:
    """The only unit of the first phase is taken, by someone who is done once the waiting thread lets others run."""
    config, arrays = made(VARIANTS[2], "float32")
    decoder, waited = CPUDecoder(GPT2(config, arrays), 1, V), list[int]()
    phases, zeros, starts = decoder.memory["phases"], np.zeros(1, np.int32), np.array([0, 1], np.int32)

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def yielded() -> int:
        waited.append(int(phases[1:].sum()))  # of the phases after it, nobody has begun any
        phases[0, 8] = 1
        return 0

    given, phases[0, 0] = decoder.given, 1
    given.tokens = given.positions = given.texts = zeros.ctypes.data
    given.starts, given.R, given.G = starts.ctypes.data, 1, 1
    given.sched_yield = ctypes.cast(yielded, ctypes.c_void_p)
    decoder.function.fxn(ctypes.c_uint64(ctypes.addressof(given)))
    assert waited[0] == 0
    assert phases[1:-1, 8].all()


def test_every_thread_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "threads", ThreadPoolExecutor(3))
    called = list[int]()

    class Program:
        @staticmethod
        def fxn(address: ctypes.c_uint64) -> None:
            called.append(address.value)

    with Context(NUM_CPU_THREADS=3):
        internals.in_parallel(Program(), 17)
    assert called == [17, 17, 17]


@pytest.mark.parametrize(("dtype", "kind"), [(None, CPUDecoder), (dtypes.bfloat16, CachedModel)])
def test_which_decoder(dtype: Any, kind: type) -> None:
    config, arrays = made(VARIANTS[2], "float32")
    assert type(Plain(dtype).decoder(GPT2(config, arrays), 1, 8, V)) is kind
