import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import islice
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.cli import InputError
from data.testing import call, refused, write_stories, write_tokens
from data.text import bench_data as bench
from data.text.loader import Loader
from data.text.prepare import prepare
from data.text.shards import read_meta
from data.text.sources import stream
from data.text.stories import stories

Apart = list[tuple[Callable[..., Any], tuple[Any, ...]]]


def documents(path: Path) -> list[str]:
    text = stream(str(path), "train")
    assert text
    return [piece.text for chunk in text.chunks() for piece in chunk.pieces]


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: Iterable[float], worked: Iterable[float] = ()) -> None:
    """What the benchmark's clocks show, look by look."""
    elapsed, busy = iter(seconds), iter(worked)
    clocks = SimpleNamespace(perf_counter=lambda: next(elapsed), process_time=lambda: next(busy))
    monkeypatch.setattr(bench, "time", clocks)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Apart:
    """What would have been called in processes of their own, and is called in this one."""
    called: Apart = []

    class Pool:
        def __init__(self, workers: int, context: SpawnContext):
            assert (workers, context.get_start_method()) == (1, "spawn")
            self.used = False

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *error: object) -> None:
            assert self.used

        def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            assert not self.used
            self.used = True
            called.append((function, arguments))
            future: Future[Any] = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    return called


def test_the_text_is_of_new_documents(tmp_path: Path) -> None:
    material = list(islice(stories(0), 100))
    path = tmp_path / "text.txt"
    bench.write_text(path, 300_000, material)
    assert 300_000 <= path.stat().st_size < 302_000
    written = documents(path)
    assert len(set(written)) > 0.95 * len(written)
    average = sum(map(len, material)) / len(material)
    assert sum(map(len, written)) / len(written) == pytest.approx(average, rel=0.2)
    bench.write_text(tmp_path / "again.txt", 300_000, material)
    assert (tmp_path / "again.txt").read_bytes() == path.read_bytes()


def test_a_document_begins_like_one_and_ends_like_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first sentence that ends behind the middle; one that has no such end gives all of itself to end with."""
    bench.write_text(tmp_path / "text.txt", 2000, ["aa. ab. ac. ad.", "ba. bb. bc. bd.", "é none"])
    begins, ends = ("aa. ab. ac.", "ba. bb. bc.", ""), (" ad.", " bd.", "é none")
    assert set(documents(tmp_path / "text.txt")) == {(a + b).strip() for a in begins for b in ends}
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "0.00/2.00k" in first
    assert f"{(tmp_path / 'text.txt').stat().st_size / 1000:.2f}kB" in last


def test_the_rate_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the text over seconds, without the first call and what lies beyond the sample."""
    path = tmp_path / "text.txt"
    path.write_text("é" * 700)
    encoded: list[str] = []
    encoding = SimpleNamespace(encode_to_numpy=lambda text, allowed_special: encoded.append(text))
    monkeypatch.setattr(bench, "tokenizer", lambda: encoding)
    monkeypatch.setattr(bench, "BATCH", 100)
    monkeypatch.setattr(bench, "SAMPLE", 501)  # within the 251st character
    set_clock(monkeypatch, [3.0, 7.0])
    assert bench.tiktoken_rate(path) == 500 / 4
    assert encoded == ["é" * 100, "é" * 100, "é" * 100, "é" * 50]


def test_the_cost_of_preparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, [5.0, 9.0], [1.0, 7.5])
    seconds, worked, peak = bench.measure_prepare(write_stories(tmp_path / "text.txt"), tmp_path / "out")
    assert (seconds, worked) == (4.0, 6.5)
    assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)
    assert read_meta(tmp_path / "out")["splits"]["train"]["source"] == str(tmp_path / "text.txt")


@pytest.mark.parametrize(("at_most", "batches"), [(5, 5), (50, 24)])
@pytest.mark.parametrize("cold", [True, False])
def test_the_rate_of_the_loader(
    cold: bool, at_most: int, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 99 windows of 8 tokens, in batches of 4: the first by itself, and an epoch or `BATCHES` behind it."""
    folder = write_tokens(tmp_path / "data", np.arange(99 * 8 + 3), np.arange(9))
    taken: list[str] = []
    dropped: list[tuple[str, int, int, int]] = []
    next_batch = Loader.next_batch

    def counted(loader: Loader) -> tuple[np.ndarray, np.ndarray]:
        taken.append(loader.split)
        return next_batch(loader)

    monkeypatch.setattr(Loader, "next_batch", counted)
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda fd, start, count, advice: dropped.append((os.readlink(f"/proc/self/fd/{fd}"), start, count, advice)),
    )
    for name, value in {"BATCH_SIZE": 4, "SEQ_LEN": 8, "BATCHES": at_most}.items():
        monkeypatch.setattr(bench, name, value)
    set_clock(monkeypatch, [10.0, 10.5, 20.0, 22.0])
    first, rate = bench.measure_loader(folder, cold)
    assert first == 0.5
    assert rate == batches * 4 * 8 / 2
    assert taken == ["train"] * (1 + batches)
    files = sorted((str(path), 0, 0, os.POSIX_FADV_DONTNEED) for path in folder.iterdir())
    assert sorted(dropped) == (files if cold else [])


def test_the_loader_is_measured_beside_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokens(tmp_path / "data", np.arange(99 * 8), np.arange(9))
    np.memmap(folder / "valid-00000.bin", "<u2", "r+", offset=64)[3] = 7
    monkeypatch.setattr(bench, "SEQ_LEN", 8)
    with pytest.raises(InputError, match=r"valid-00000\.bin is corrupted"):
        bench.measure_loader(folder, False)


def test_the_figures(apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one has a value of its own, and is what was measured, or is worked out of that."""
    rates = iter([20e6, 40e6])
    written: dict[str, Any] = {}

    def write_text(path: Path, size: int, material: list[str]) -> None:
        written.update(size=size, material=material, path=path)
        path.write_text("x" * 1000)

    def measure_prepare(text: Path, out: Path) -> tuple[float, float, int]:
        assert text == written["path"]
        write_tokens(out, np.arange(70), np.arange(7))
        return 4.0, 6.0, 123_000_000

    def measure_loader(folder: Path, cold: bool) -> tuple[float, float]:
        assert read_meta(folder)["splits"]["train"]["tokens"] == 70
        return (0.5, 60e6) if cold else (0.25, 90e6)

    def tiktoken_rate(path: Path) -> float:
        assert path == written["path"]
        return next(rates)

    for function in (write_text, measure_prepare, measure_loader, tiktoken_rate):
        monkeypatch.setattr(bench, function.__name__, function)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert bench.measure(999, ["a", "b"]) == {
        "text_bytes": 1000,
        "tokens": 77,
        "cores": 5,
        "tiktoken_bytes_per_second_before": 20e6,
        "tiktoken_bytes_per_second_after": 40e6,
        "prepare_seconds": 4.0,
        "prepare_cpu_seconds": 6.0,
        "prepare_bytes_per_second": 250.0,
        "prepare_over_tiktoken_times_cores": 250 / (30e6 * 5),
        "prepare_peak_bytes": 123_000_000,
        "loader_cold_start_seconds": 0.5,
        "loader_cold_tokens_per_second": 60e6,
        "loader_warm_start_seconds": 0.25,
        "loader_warm_tokens_per_second": 90e6,
    }
    assert (written["size"], written["material"]) == (999, ["a", "b"])
    order = [tiktoken_rate, measure_prepare, tiktoken_rate, measure_loader, measure_loader]
    assert [function for function, _ in apart] == order
    assert not written["path"].exists()


FIGURES: dict[str, float] = {
    "text_bytes": 2_199_600_000,
    "tokens": 532_840_000,
    "cores": 3,
    "tiktoken_bytes_per_second_before": 30.31e6,
    "tiktoken_bytes_per_second_after": 29.04e6,
    "prepare_seconds": 40.26,
    "prepare_cpu_seconds": 100.65,
    "prepare_bytes_per_second": 54.63e6,
    "prepare_over_tiktoken_times_cores": 0.924,
    "prepare_peak_bytes": 1_105_400_000,
    "loader_cold_start_seconds": 0.224,
    "loader_cold_tokens_per_second": 66.04e6,
    "loader_warm_start_seconds": 0.016,
    "loader_warm_tokens_per_second": 108.06e6,
}
PRINTED = """
text         2,200 MB, 532.8M tokens
tiktoken     30.3 MB/s on one core before the preparation, 29.0 MB/s after it
preparation  54.6 MB/s on 3 cores: 0.92 x tiktoken x cores; 40.3 s, 1,105 MB of memory at most, 2.5 cores busy
loader, cold 66.0M tokens/s in batches of 32 x 1024, the first after 0.22 s
loader, warm 108.1M tokens/s in batches of 32 x 1024, the first after 0.02 s
"""


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the options say is what is measured, and what was measured is printed and written."""
    asked: list[tuple[int, list[str]]] = []

    def measure(size: int, material: list[str]) -> dict[str, float]:
        asked.append((size, material))
        return FIGURES

    monkeypatch.setattr(bench, "measure", measure)
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    result = call(bench.main, "--size", 17, "--text", "text.jsonl", "--json", "found.json", cwd=tmp_path)
    assert (result.code, result.out) == (0, PRINTED)
    assert json.loads((tmp_path / "found.json").read_text()) == FIGURES
    assert call(bench.main, cwd=tmp_path).out == PRINTED
    assert asked == [(17_000_000, ["one", "two"]), (200_000_000, list(islice(stories(1), 5000)))]
    assert sorted(os.listdir(tmp_path)) == ["found.json", "text.jsonl"]
    refused(
        call(bench.main, "--size", "9", cwd=tmp_path),
        "--size: 9 is not a whole number of at least 10; see `python -m data.text.bench_data --help`",
    )
    refused(call(bench.main, "--text", "nowhere.txt", cwd=tmp_path), "there is no file nowhere.txt")
    refused(call(bench.main, "--json", "nowhere/x.json", cwd=tmp_path), "there is no folder nowhere to write x.json to")


def test_as_a_process() -> None:
    line = [sys.executable, "-m", "data.text.bench_data", "--text", "nowhere.txt"]
    ended = subprocess.run(line, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: there is no file nowhere.txt")


def test_all_that_is_measured(apart: Apart, tmp_path: Path) -> None:
    found = bench.measure(300_000, list(islice(stories(0), 200)))
    assert all(value > 0 for value in found.values())
    assert 300_000 <= found["text_bytes"] < 302_000
    text = tmp_path / "text.txt"
    bench.write_text(text, 300_000, list(islice(stories(0), 200)))
    splits = prepare(str(text), tmp_path / "out")["splits"]
    assert found["tokens"] == splits["train"]["tokens"] + splits["valid"]["tokens"]
    assert found["prepare_bytes_per_second"] == pytest.approx(found["text_bytes"] / found["prepare_seconds"])


@pytest.mark.slow
def test_in_processes_of_their_own() -> None:
    found = bench.measure(300_000, list(islice(stories(0), 200)))
    assert all(value > 0 for value in found.values())
