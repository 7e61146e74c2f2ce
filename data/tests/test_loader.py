import json
from pathlib import Path

import numpy as np
import pytest

from data import loader
from data.cli import InputError
from data.loader import IGNORED, Loader, windows
from data.shards import ShardWriter, write_meta
from data.tokenizer import VOCAB_SIZE

N, T, B = 1003, 10, 4  # 100 windows of 10 tokens, and 2 tokens more than they cover


def prepare(folder: Path, train: np.ndarray, shard_tokens: int = 37) -> Path:
    """A folder with `train` in shards too short for some windows, and 28 tokens of valid."""
    splits = {}
    folder.mkdir()
    for split, tokens in {"train": train, "valid": np.arange(28)}.items():
        with ShardWriter(folder, split, shard_tokens) as writer:
            writer.write(tokens.astype(np.uint16))
        splits[split] = {"source": "", "documents": 1, "tokens": len(tokens), "shards": writer.shards}
    write_meta(folder, splits)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("loader") / "data", np.arange(N))


def starts(x: np.ndarray) -> list[int]:
    """Which windows a batch consists of: the tokens of the data count up from 0."""
    return [int(row[0]) // T for row in x]


def test_batches(data: Path) -> None:
    loader = Loader(data, "train", B, T, seed=1)
    assert (loader.tokens, loader.windows) == (N, 100)
    for _ in range(60):
        x, y = loader.next_batch()
        for array in (x, y):
            assert array.shape == (B, T)
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        np.testing.assert_array_equal(x, x[:, :1] + np.arange(T))  # consecutive also where two or more shards meet
        np.testing.assert_array_equal(y, x + 1)
        assert not (x[:, 0] % T).any()


def test_a_batch_of_one_shares_no_memory(data: Path) -> None:
    """Inputs and targets overlap in the data; writing to one must not change the other."""
    assert not np.shares_memory(*Loader(data, "train", 1, T, seed=1).next_batch())


def test_every_window_once_an_epoch(data: Path) -> None:
    loader = Loader(data, "train", 8, T, seed=1)  # 100 windows are 12.5 batches
    seen = [w for _ in range(25) for w in starts(loader.next_batch()[0])]
    first, second = seen[:100], seen[100:]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != list(range(100))
    assert (loader.epoch, loader.position) == (2, 200)


def test_the_seed_decides(data: Path) -> None:
    orders = [starts(Loader(data, "train", 50, T, seed).next_batch()[0]) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("windows", [1, 255, 256, 65_536, 100_000])
def test_the_order_is_numpys(windows: int) -> None:
    """So that a saved run goes on in the order that it began with, whatever this is stored in."""
    order = loader._order(3, 5, windows)
    np.testing.assert_array_equal(order, np.random.default_rng((3, 5)).permutation(windows))
    assert order.nbytes <= 4 * windows


def test_ranks_partition_the_batch(data: Path) -> None:
    whole = Loader(data, "train", 12, T, seed=1)
    ranks = [Loader(data, "train", 4, T, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(20):  # over the end of two epochs
        parts = [rank.next_batch() for rank in ranks]
        x, y = whole.next_batch()
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), x)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), y)
    assert all(rank.state() == whole.state() for rank in ranks)


@pytest.mark.parametrize("steps", [0, 7, 12, 13, 30])
def test_restore_goes_on_exactly(steps: int, data: Path) -> None:
    loader = Loader(data, "train", 8, T, seed=1)
    for _ in range(steps):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(data, "train", 8, T, seed=1)
    resumed.restore(state)
    for _ in range(20):
        for a, b in zip(loader.next_batch(), resumed.next_batch(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"seed": 2}, "seed was 2 .* is 1 now"),
        ({"seq_len": 20}, "sequence length was 20"),
        ({"split": "valid"}, "split was 'valid'"),
        ({"data": "00"}, "checksum of the data"),
        ({"position": -1}, "position -1 is no count"),
        ({"position": None}, "position None is no count"),
    ],
)
def test_restore_refuses_another_run(change: dict[str, object], fault: str, data: Path) -> None:
    loader = Loader(data, "train", B, T, seed=1)
    with pytest.raises(InputError, match=fault):
        loader.restore(loader.state() | change)
    assert loader.position == 0


def test_too_few_windows(data: Path) -> None:
    Loader(data, "train", 50, T, seed=1, world_size=2)
    with pytest.raises(InputError, match=r"train split of .* has 100 windows of 10 tokens, fewer than the 102 of"):
        Loader(data, "train", 51, T, seed=1, world_size=2)
    with pytest.raises(InputError, match="has 0 windows"):
        Loader(data, "train", 1, N, seed=1)
    Loader(data, "train", 1, N - 1, seed=1)


@pytest.mark.parametrize("max_tokens", [None, 500, 7, 10_000])
def test_evaluation_covers_every_target_once(max_tokens: int | None, data: Path) -> None:
    batches = list(windows(data, "train", B, T, max_tokens))
    assert {array.shape for batch in batches for array in batch} == {(B, T)}
    assert {array.dtype for batch in batches for array in batch} == {np.dtype(np.int32)}
    x = np.concatenate([x.ravel() for x, _ in batches])
    y = np.concatenate([y.ravel() for _, y in batches])
    real = y != IGNORED
    targets = min(N - 1, max_tokens or N)
    np.testing.assert_array_equal(y[real], np.arange(1, targets + 1))
    np.testing.assert_array_equal(x[real], np.arange(targets))
    assert not x[~real].any()
    assert len(x) - targets < B * T


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokens = np.arange(N)
    tokens[40] = VOCAB_SIZE  # in the second shard of 37
    folder = prepare(tmp_path / "data", tokens)
    fault = rf"train-00001\.bin holds token {VOCAB_SIZE}, beyond the vocabulary"
    with pytest.raises(InputError, match=fault):
        list(windows(folder, "train", B, T))
    loader = Loader(folder, "train", 100, T, seed=1)
    with pytest.raises(InputError, match=fault):
        loader.next_batch()


def test_headers_are_checked_on_opening(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "data", np.arange(N))
    path = folder / "train-00020.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train-00020\.bin is truncated"):
        Loader(folder, "train", B, T, seed=1)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        next(windows(tmp_path / "nowhere", "valid", B, T))
