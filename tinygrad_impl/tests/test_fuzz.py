"""A short run of the fuzzer; the whole is `python -m tinygrad_impl.tests.fuzz`."""

import random

from tinygrad_impl.tests.fuzz import damaged, fuzz, same


def test_damaged_files_are_refused_or_harmless() -> None:
    ends, faults = fuzz(600, seed=1, quiet=True)
    assert not faults
    assert ends["refused"] > 400
    assert ends["harmless"] > 20


def test_the_fuzzer_damages() -> None:
    chance, content = random.Random(0), b'{"a": 1, "b": [2]}' * 20
    kinds = {kind for kind, changed in (damaged(content, chance) for _ in range(300)) if changed != content}
    assert kinds == {
        "bits",
        "truncated",
        "header",
        "length",
        "bytes",
        "extended",
        "cut out",
        "word",
        "empty",
        "doubled",
    }
    assert same([{"a": (1, 2.0)}], [{"a": (1, 2.0)}])
    assert not same([{"a": (1, 2.0)}], [{"a": (1, 2)}])
