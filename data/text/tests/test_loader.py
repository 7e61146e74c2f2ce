import json
from pathlib import Path

import numpy as np
import pytest

from data.cli import InputError
from data.text import loader
from data.text.loader import IGNORED, Loader, windows
from data.text.shards import ShardWriter, write_meta
from data.text.tokenizer import VOCAB_SIZE

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


def test_the_epoch_is_of_whole_passes(data: Path) -> None:
    loader = Loader(data, "train", 8, T, seed=1)
    epochs = []
    for _ in range(38):
        epochs.append(loader.epoch)
        loader.next_batch()
    assert epochs == [0] * 13 + [1] * 12 + [2] * 13  # 100, 200 and 300 windows lie within or behind batches 13, 25, 38
    assert type(loader.epoch) is int


def test_the_seed_decides(data: Path) -> None:
    orders = [starts(Loader(data, "train", 50, T, seed).next_batch()[0]) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("windows", [1, 255, 256, 65_536, 100_000])
def test_the_order_is_numpys(windows: int) -> None:
    """So that a saved run goes on in the order that it began with, whatever this is stored in."""
    order = loader._order(3, 5, windows)
    np.testing.assert_array_equal(order, np.random.default_rng((3, 5)).permutation(windows))
    assert order.nbytes <= 4 * windows


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_batches_come_in_numpys_order_of_each_epoch(count: int, tmp_path: Path) -> None:
    """For numbers of windows about those at which they take more bytes; twelve epochs, so that no seed is an epoch."""
    folder = prepare(tmp_path / "data", np.arange(3 * count + 1), shard_tokens=100)
    loader = Loader(folder, "train", count, 3, seed=7)
    for epoch in range(12):
        expected = np.random.default_rng((7, epoch)).permutation(count)
        np.testing.assert_array_equal(loader.next_batch()[0][:, 0], 3 * expected)


def test_an_epochs_order_is_drawn_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while batches of two ranks run over its end by turns: of gigabytes of text it takes seconds."""
    drawn: list[tuple[int, int]] = []
    default_rng = np.random.default_rng

    def counted(seed: tuple[int, int]) -> np.random.Generator:
        drawn.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    ranks = [Loader(data, "train", 8, T, seed=98, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(10):
        for rank in ranks:
            rank.next_batch()
    assert drawn == [(98, 0), (98, 1)]


@pytest.mark.parametrize(("batch_size", "seq_len", "world_size"), [(1, 7, 1), (3, 1, 2), (5, 13, 4), (2, 97, 3)])
def test_other_shapes(batch_size: int, seq_len: int, world_size: int, data: Path) -> None:
    """Rows of 1,003 tokens: what a window holds, how many there are, and whose turn it is."""
    count = (N - 1) // seq_len
    expected = [w for epoch in range(40) for w in np.random.default_rng((3, epoch)).permutation(count)]
    ranks = [Loader(data, "train", batch_size, seq_len, 3, rank, world_size) for rank in range(world_size)]
    assert {rank.windows for rank in ranks} == {count}
    for step in range(4):
        for rank, ours in enumerate(ranks):
            begin = (step * world_size + rank) * batch_size
            first = np.array(expected[begin : begin + batch_size])[:, None] * seq_len + np.arange(seq_len)
            x, y = ours.next_batch()
            np.testing.assert_array_equal(x, first)
            np.testing.assert_array_equal(y, first + 1)
    assert {rank.position for rank in ranks} == {4 * world_size * batch_size}


def test_the_validation_split_is_read_when_asked_for(tmp_path: Path) -> None:
    """Its tokens are none of those to train on."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits = {}
    for split, tokens in {"train": np.arange(101), "valid": 1000 + np.arange(41)}.items():
        with ShardWriter(folder, split, 37) as writer:
            writer.write(tokens.astype(np.uint16))
        splits[split] = {"source": "", "documents": 1, "tokens": len(tokens), "shards": writer.shards}
    write_meta(folder, splits)
    for split, first, count in (("train", 0, 101), ("valid", 1000, 41)):
        (_, y), *more = windows(folder, split, 11, T)
        assert not more
        np.testing.assert_array_equal(y[y != IGNORED], first + np.arange(1, count))
        ours = Loader(folder, split, 4, T, seed=1)
        assert (ours.tokens, ours.windows, ours.state()["split"]) == (count, (count - 1) // T, split)
        assert set(ours.next_batch()[0].ravel()) <= set(first + np.arange(count))


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


def test_state_is_what_restore_needs(data: Path) -> None:
    loader = Loader(data, "train", B, T, seed=1, world_size=3)
    loader.next_batch()
    checksum = json.loads((data / "meta.json").read_text())["checksum"]
    state = {"position": 3 * B, "seed": 1, "seq_len": T, "split": "train", "data": checksum}
    assert loader.state() == state
    other = Loader(data, "train", 7, T, seed=1)  # another batch size, and one rank
    other.restore(state)
    expected = np.random.default_rng((1, 0)).permutation(100)[3 * B : 3 * B + 7]
    np.testing.assert_array_equal(other.next_batch()[0][:, 0], T * expected)
    other.restore(state | {"position": 0})
    assert other.position == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"seed": 2}, "cannot resume: the seed was 2 in the saved run and is 1 now"),
        ({"seq_len": 20}, "the sequence length was 20 in the saved run and is 10 now"),
        ({"split": "valid"}, "the split was 'valid' in the saved run and is 'train' now"),
        ({"data": "00"}, "the checksum of the data was '00' in the saved run and is '[0-9a-f]{64}' now"),
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


def test_evaluation_reads_on_from_batch_to_batch(data: Path) -> None:
    """Row after row, batch after batch, up to a number of targets that ends within a row, with one batch, or behind."""
    for max_tokens in (0, 1, B * T - 1, B * T, B * T + 1, N - 2, N - 1, N):
        targets = min(max_tokens, N - 1)
        batches = list(windows(data, "train", B, T, max_tokens))
        assert len(batches) == -(-targets // (B * T))
        for i, (x, y) in enumerate(batches):
            position = i * B * T + np.arange(B * T).reshape(B, T)
            np.testing.assert_array_equal(x, np.where(position < targets, position, 0))
            np.testing.assert_array_equal(y, np.where(position < targets, position + 1, IGNORED))
    assert IGNORED == -100  # which PyTorch leaves out of a loss, and Hugging Face too


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
