"""What ranks tell each other."""

from functools import partial

import numpy as np
import pytest

from data.cli import InputError
from data.ranks import ALONE, Ranks, place, refuse_ranks
from data.tests.ranks import in_ranks


def tell(ranks: Ranks) -> dict[str, object]:
    """All that there is, once."""
    own = np.arange(8.0) * (ranks.rank + 1)
    averaged, reduced, collected, shared = (own.copy() for _ in range(4))
    ranks.average(averaged).wait()
    ranks.reduce(reduced).wait()
    ranks.collect(collected).wait()
    ranks.share(shared, ranks.size - 1).wait()
    ranks.barrier()
    part = slice(ranks.rank * 8 // ranks.size, (ranks.rank + 1) * 8 // ranks.size)
    return {
        "gather": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"of rank {ranks.rank}"),
        "numbers": ranks.numbers(ranks.rank, 0.1).tolist(),
        "averaged": averaged.tolist(),
        "reduced": reduced[part].tolist(),
        "collected": collected.tolist(),
        "shared": shared.tolist(),
    }


def test_what_ranks_tell_each_other() -> None:
    found = in_ranks(2, tell)
    mean = np.arange(8.0) * 1.5
    for rank, told in enumerate(found):
        assert told["gather"] == [{"rank": 0}, {"rank": 1}]
        assert told["broadcast"] == "of rank 0"
        assert told["numbers"] == [[0, 0.1], [1, 0.1]]
        assert told["averaged"] == mean.tolist()
        assert told["reduced"] == mean[rank * 4 : rank * 4 + 4].tolist()
        assert told["collected"] == [0, 1, 2, 3, 8, 10, 12, 14]
        assert told["shared"] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_one_process_is_all_there_is() -> None:
    told = tell(ALONE)
    assert told["gather"] == [{"rank": 0}]
    assert told["numbers"] == [[0, 0.1]]
    for name in ("averaged", "reduced", "collected", "shared"):
        assert told[name] == list(range(8))


def fail(ranks: Ranks) -> None:
    assert ranks.rank == 0, "it is not"
    ranks.barrier()


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: [\s\S]*it is not"):
        in_ranks(2, fail)


def test_the_place_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    put = partial(map, lambda item: monkeypatch.setenv(*item))
    assert place() is None
    list(put({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items()))
    assert place() is None
    refuse_ranks("evaluation")
    list(put({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items()))
    assert vars(place()) == {"rank": 3, "size": 4, "local_rank": 1, "local_size": 2}
    with pytest.raises(InputError, match="evaluation is the work of one process, and this is rank 3 of 4; start it"):
        refuse_ranks("evaluation")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match=r"torchrun sets RANK.* and here are RANK=first"):
        place()
    for rank, size in ((5, 2), (-1, 2)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        with pytest.raises(InputError, match=rf"RANK={rank} of WORLD_SIZE=2 .* cannot be"):
            place()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE=0 cannot be"):
        place()
