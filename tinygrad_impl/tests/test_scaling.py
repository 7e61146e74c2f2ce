"""`python -m tinygrad_impl.scaling`: the model of a step on many GPUs at its limits, and how it is compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.checkpoints.config import parameter_count
from data.testing import call, refused
from tinygrad_impl import scaling
from tinygrad_impl.scaling import GLOBAL, LARGE, SMALL, Measured, Network, check, collective, in_turn, sent, step

FREE = Network(
    within=1e30, between=1e30, call=0, step_within=0, step_between=0, contention=0, slowest=0
)  # sends in no time
BYTES = 4 * parameter_count(SMALL.config)


def test_one_gpu_sends_nothing() -> None:
    assert collective(Network(), 1, BYTES) == 0
    for tokens, micro_batches in ((32 * 1024, 1), (GLOBAL, 16), (1024, 1)):
        seconds, exposed = step(SMALL, Network(), 1, tokens)
        assert seconds == pytest.approx(micro_batches * SMALL.fixed + tokens * SMALL.token + SMALL.adamw)
        assert exposed == 0


def test_limits_of_a_collective() -> None:
    """By bandwidth, an all-reduce takes 2 (N - 1) / N of the bytes; by latency, as many steps as a ring has."""
    rapid = replace(FREE, within=1e9)
    for gpus in (2, 4, 8):
        assert 2 * collective(rapid, gpus, BYTES) == pytest.approx(2 * (gpus - 1) / gpus * BYTES / 1e9)
    # between hosts there are as many rings as GPUs on a host; but none is faster than a GPU
    assert collective(replace(FREE, between=1e9), 64, BYTES) == pytest.approx(63 / 64 * BYTES / 8e9)
    assert collective(replace(rapid, between=1e9), 64, BYTES) == pytest.approx(63 / 64 * BYTES / 1e9)
    assert collective(replace(FREE, between=1e9, per_host=2), 4, BYTES) == pytest.approx(3 / 4 * BYTES / 2e9)
    slow = replace(FREE, call=1000, step_within=1, step_between=100)
    assert collective(slow, 8, BYTES) == 1000 + 7
    assert collective(slow, 32, BYTES) == 1000 + 28 + 3 * 100
    assert collective(slow, 32, BYTES, hierarchical=True) == 2 * 1000 + 7 + 3 * 100
    assert collective(slow, 8, BYTES, hierarchical=True) == collective(slow, 8, BYTES)
    both = collective(replace(FREE, within=1e9, between=1e8), 32, BYTES, hierarchical=True)
    assert both == pytest.approx(7 / 8 * BYTES / 1e9 + 3 / 4 * BYTES / 8 / 1e8)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_more_gpus_take_longer(hierarchical: bool) -> None:
    for work in (SMALL, LARGE):
        costs = [collective(Network(), gpus, BYTES, hierarchical) for gpus in scaling.GPUS]
        assert costs == sorted(costs)
        exposed = [step(work, Network(), gpus, 1024, hierarchical)[1] for gpus in scaling.GPUS]
        assert exposed == sorted(exposed)


def test_buckets() -> None:
    """Of 124M three layers each and the embeddings; the layers' gradients come while the backward pass computes."""
    sizes, there, read = zip(*sent(SMALL.config), strict=True)
    assert sizes[:-1] == (3 * 12 * 768**2,) * 4
    assert sizes[-1] == pytest.approx(50257 * 768 + 1024 * 768, rel=0.01)
    # the head, of 0.27 of the operations, comes first
    assert there == pytest.approx([*(0.27 + 0.73 * i / 4 for i in (1, 2, 3, 4)), 1], abs=0.01)
    assert read == (2, 2, 2, 2, 4)  # the embeddings are gathered as they are
    for work in (SMALL, LARGE):
        assert sum(size for size, *_ in sent(work.config)) == pytest.approx(parameter_count(work.config), rel=1e-3)


def test_what_is_sent_in_turn() -> None:
    assert in_turn([], []) == 0
    assert in_turn([1, 2, 9], [3, 1, 2]) == 11
    assert in_turn([1, 2, 3], [3, 1, 2]) == 7


def test_what_is_hidden() -> None:
    """Sending costs nothing in the backward pass, but for the last bucket and what contention takes."""
    tokens, alone = 32 * 1024, step(SMALL, FREE, 1, 32 * 1024)[0]
    assert step(SMALL, FREE, 4, tokens)[0] == pytest.approx(alone - SMALL.adamw * 3 / 4)  # AdamW is shared out
    sizes, there, read = zip(*sent(SMALL.config), strict=True)
    gradients, weights = 4 * sum(sizes), sum(size * width for size, width in zip(sizes, read, strict=True))
    rate = 4 / 3 * 400e9  # bytes of whole buckets a second
    network = replace(FREE, within=400e9)
    seconds, exposed = step(SMALL, network, 4, tokens)
    late = 4 * sum(sizes[-2:]) / rate  # the last layers' gradients are there no sooner than the embeddings'
    # AdamW goes on while the embeddings are gathered, which it updates first
    first = SMALL.adamw / 4 * sizes[-1] / sum(sizes)
    assert exposed == pytest.approx(late + first + weights / rate - SMALL.adamw / 4)
    assert seconds == pytest.approx(alone - SMALL.adamw * 3 / 4 + exposed)
    slower, _ = step(SMALL, replace(network, slowest=0.1), 4, tokens)
    assert slower == pytest.approx(seconds + 0.1 * (SMALL.fixed + tokens * SMALL.token))
    contended, _ = step(SMALL, replace(network, contention=0.5), 4, tokens)
    assert contended == pytest.approx(seconds + 0.5 * (gradients / rate - late))
    # nothing but the last micro-batch hides anything, and what is too slow is not hidden
    slow = replace(FREE, within=1e6)
    for micro_batches in (1, 4):
        seconds, exposed = step(SMALL, slow, 4, micro_batches * tokens)
        backward = scaling.BACKWARD * (SMALL.fixed + tokens * SMALL.token)
        hidden = (1 - there[0]) * backward + SMALL.adamw / 4 - first
        assert exposed == pytest.approx((gradients + weights) / (4 / 3 * 1e6) - hidden, abs=1e-6)
    # by latency: 5 buckets each way, of which 3 are hidden, and the norm
    _, exposed = step(SMALL, replace(FREE, call=1e-3), 4, tokens)
    assert exposed == pytest.approx((2 + 5 + 1) * 1e-3 - (SMALL.adamw / 4 - first))


def test_efficiency() -> None:
    shared = replace(SMALL, adamw=0.0)
    for strong in (False, True):
        assert scaling.efficiency(SMALL, Network(), 1, strong) == 1
        assert scaling.efficiency(shared, FREE, 16, strong) == pytest.approx(1)
    sizes, _, read = zip(*sent(SMALL.config), strict=True)
    whole = 4 * sum(sizes) + sum(size * width for size, width in zip(sizes, read, strict=True))
    slow = replace(FREE, within=whole / 1500)  # of which two GPUs send a half
    assert scaling.efficiency(shared, slow, 2, strong=False) == pytest.approx(0.058 / 750, rel=0.02)
    assert scaling.efficiency(shared, slow, 2, strong=True) == pytest.approx(16 * 0.058 / 2 / 750, rel=0.02)


def test_check() -> None:
    """Of the right number of hosts, in one micro-batch, as a share of what was measured."""
    network = Network(between=5e9)
    seconds, _ = step(replace(SMALL, micro=64), replace(network, per_host=2), 4, 64 * 1024)
    assert check([Measured("gpt2", 4, 2, 64, 9.0)], network) == [seconds]
    assert check([Measured("gpt2", 4, 1, 64, 9.0)], network)[0] < 0.8 * seconds
    # the constants against what they come from, H200s of one host: GPUs, windows, ms
    small, large = [(1, 32, 60.11), (4, 32, 62.13), (1, 64, 114.50), (4, 64, 121.56)], [(1, 4, 104.69), (4, 4, 114.93)]
    for preset, rows in (("gpt2", small), ("gpt2-xl", large)):
        measured = [Measured(preset, gpus, 1, windows, ms / 1e3) for gpus, windows, ms in rows]
        assert check(measured) == pytest.approx([row.seconds for row in measured], rel=0.02)


def bench(tmp_path: Path, name: str = "bench.json", seconds: float = 0.0625, **more: Any) -> str:
    rows = {"tinygrad": {"step_seconds": seconds}, "torch-compile": {"step_seconds": 9.0}}
    found = {"preset": "gpt2", "batch_size": 32, "seq_len": 1024, "device": "CUDA", "contenders": rows} | more
    (tmp_path / name).write_text(json.dumps(found), encoding="utf-8")
    return name


ONE = {"contenders": {"tinygrad": {"step_seconds": 0.061}}}


def test_the_tables(tmp_path: Path) -> None:
    result = call(scaling.main, "--json", "found.json", cwd=tmp_path)
    assert result.code == 0, result
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(found["tables"]) == ["gpt2, weak", "gpt2, strong", "gpt2-xl, weak", "gpt2-xl, strong"]
    for name, rows in found["tables"].items():
        assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        ends = {n: next((f"from {r['gpus']} on" for r in rows if r["rings"] < n), "nowhere") for n in (0.9, 0.5)}
        assert f"rings: under 0.9 {ends[0.9]}, under 0.5 {ends[0.5]}\n" in result.out, name
    assert f"   512{found['tables']['gpt2, weak'][-1]['seconds'] * 1e3:11.2f}" in result.out


def test_measured_beside_the_model(tmp_path: Path) -> None:
    """1, 2 and 4 GPUs, 2 x 2, and one that was cut off: the figures against what the model was seen to have."""
    files = [bench(tmp_path, "two.json", 0.0625, ranks=2, hosts=1, one=ONE)]
    files += [bench(tmp_path, "four.json", 0.0658, ranks=4, hosts=1, one=ONE)]
    files += [bench(tmp_path, "hosts.json", 0.07, ranks=4, hosts=2, one={})]
    files += [bench(tmp_path, "cut.json", ranks=4, one=ONE, contenders={})]
    result = call(scaling.main, "--check", *files, "--between", 40, "--json", "found.json", cwd=tmp_path)
    assert result.code == 0, result
    expected = [(1, 1, 0.061), (2, 1, 0.0625), (1, 1, 0.061), (4, 1, 0.0658), (4, 2, 0.07), (1, 1, 0.061)]
    rows = [Measured("gpt2", gpus, hosts, 32, seconds) for gpus, hosts, seconds in expected]
    modelled = check(rows, Network(between=5e9))
    lines = [line.split() for line in result.out.splitlines()]
    names = {(1, 1): ["1"], (2, 1): ["2"], (4, 1): ["4"], (4, 2): ["2", "x", "2"]}
    for line, row, seconds in zip(lines[1:-1], rows, modelled, strict=True):
        figures = [f"{row.seconds * 1e3:.2f}", f"{seconds * 1e3:.2f}", f"{seconds / row.seconds - 1:+.1%}"]
        assert line == ["gpt2", *names[row.gpus, row.hosts], "32", *figures]
    # as the tables have them: 59.4 ms on one GPU is 2.6 % less than what was measured here
    assert lines[1] == ["gpt2", "1", "32", "61.00", "59.43", "-2.6%"]
    errors = [seconds / row.seconds - 1 for row, seconds in zip(rows, modelled, strict=True)]
    assert result.out.splitlines()[-1] == f"largest error: {max(errors, key=abs):+.1%}"
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in found["checked"]] == modelled
    assert found["network"]["between"] == 5e9
    assert scaling.measured_in(tmp_path / bench(tmp_path)) == [Measured("gpt2", 1, 1, 32, 0.0625)]


def test_what_it_refuses(tmp_path: Path) -> None:
    def refuse(file: str, *words: str) -> None:
        refused(call(scaling.main, "--check", file, cwd=tmp_path), *words)

    refuse(bench(tmp_path, preset="tiny"), "bench.json is of tiny with windows of 1024 on CUDA; name one of gpt2 or")
    refuse(bench(tmp_path, seq_len=256), "with windows of 256")
    refuse(bench(tmp_path, device="CPU"), "on CPU; name one of")
    refuse(bench(tmp_path, ranks=3, hosts=2, one=ONE), "hosts with different numbers of GPUs")
    refuse(bench(tmp_path, ranks=4, contenders={}), "cut off before it had measured tinygrad")
    refuse(bench(tmp_path, contenders={"tinygrad": {"step_seconds": "a"}}), "bench.json is no file of")
    refuse("nowhere.json", "nowhere.json is no file of tinygrad_impl.bench --json")
    (tmp_path / "other.json").write_text("[]")
    refuse("other.json", "other.json is no file of")
    refused(call(scaling.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere")
    refused(call(scaling.main, "--between", "0", cwd=tmp_path), "--between")
