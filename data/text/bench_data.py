"""How fast the data pipeline is, and how much memory it takes: `python -m data.text.bench_data`.

FIGURES.md has those of `--size 2200`.

A text is built in a temporary folder (where `TMPDIR` says), prepared, and loaded. The preparation is measured beside
plain tiktoken on one core, before it and after it, since the clock of a shared machine drifts.
"""

import json
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data.cli import ArgumentParser, Progress, integer, refuse_missing_folder, run
from data.files import atomic_write
from data.text.loader import Loader
from data.text.prepare import BATCH, prepare
from data.text.shards import Verification, read_meta
from data.text.sources import stream
from data.text.stories import stories
from data.text.tokenizer import EOT_TEXT, tokenizer

R = TypeVar("R")

SEED = 1
SAMPLE = 16 << 20  # bytes of the text that tiktoken is timed on
STORIES = 5000  # how many of our own generator the text is made of, without --text
BATCH_SIZE, SEQ_LEN = 32, 1024
BATCHES = 2000  # that the loader is timed on; of a smaller text, one epoch


def write_text(path: Path, size: int, material: list[str]) -> None:
    """Writes a .txt of `size` bytes: documents that begin like one of `material` and end like another."""
    rng = random.Random(SEED)

    def middle(document: str) -> int:
        return document.find(". ", len(document) // 2) + 1  # 0 where no sentence ends there

    with open(path, "wb") as f, Progress(total=size, unit="B", unit_scale=True, desc="writing a text") as progress:
        while f.tell() < size:
            one, other = rng.choice(material), rng.choice(material)
            progress.update(f.write(f"{one[: middle(one)]}{other[middle(other) :]}\n{EOT_TEXT}\n".encode()))


def tiktoken_rate(path: Path) -> float:
    """Bytes a second that tiktoken encodes on one core, called in the fastest way that it has."""
    with open(path, "rb") as f:
        text = f.read(SAMPLE).decode(errors="ignore")
    pieces = [text[start : start + BATCH] for start in range(0, len(text), BATCH)]
    encode = tokenizer().encode_to_numpy
    encode(pieces[0], allowed_special={EOT_TEXT})
    started = time.perf_counter()
    for piece in pieces:
        encode(piece, allowed_special={EOT_TEXT})
    return len(text.encode()) / (time.perf_counter() - started)


def measure_prepare(text: Path, out: Path) -> tuple[float, float, int]:
    """Seconds that the preparation takes, those that cores work on it, and the most bytes of memory it ever has."""
    started, worked = time.perf_counter(), time.process_time()
    prepare(str(text), out)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    return seconds, worked, int(peak[1]) << 10


def measure_loader(folder: Path, cold: bool) -> tuple[float, float]:
    """Seconds until the first batch, and tokens a second from then on. Verification runs beside it, as in training.

    cold: none of the tokens are in memory to begin with.
    """
    for path in folder.iterdir() if cold else ():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # only drops what is on disk already, as here
        os.close(fd)
    started = time.perf_counter()
    verification = Verification(folder)
    loader = Loader(folder, "train", BATCH_SIZE, SEQ_LEN, SEED)
    loader.next_batch()
    first = time.perf_counter() - started
    batches = min(BATCHES, loader.windows // BATCH_SIZE)
    started = time.perf_counter()
    for _ in range(batches):
        loader.next_batch()
    rate = batches * BATCH_SIZE * SEQ_LEN / (time.perf_counter() - started)
    verification.check(timeout=None)
    return first, rate


def measure(size: int, material: list[str]) -> dict[str, float]:
    """All figures: seconds, bytes, and bytes or tokens a second. Each comes from a process of its own."""

    def apart(function: Callable[..., R], *arguments: object) -> R:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *arguments).result()

    with tempfile.TemporaryDirectory() as temporary:
        text, folder = Path(temporary, "text.txt"), Path(temporary, "prepared")
        write_text(text, size, material)
        before = apart(tiktoken_rate, text)
        seconds, worked, memory = apart(measure_prepare, text, folder)
        after = apart(tiktoken_rate, text)
        cold_start, cold = apart(measure_loader, folder, True)
        warm_start, warm = apart(measure_loader, folder, False)
        written = text.stat().st_size
        tokens = sum(split["tokens"] for split in read_meta(folder)["splits"].values())
    tiktoken, cores = (before + after) / 2, os.cpu_count() or 1
    return {
        "text_bytes": written,
        "tokens": tokens,
        "cores": cores,
        "tiktoken_bytes_per_second_before": before,
        "tiktoken_bytes_per_second_after": after,
        "prepare_seconds": seconds,
        "prepare_cpu_seconds": worked,
        "prepare_bytes_per_second": written / seconds,
        "prepare_over_tiktoken_times_cores": written / seconds / (tiktoken * cores),
        "prepare_peak_bytes": memory,
        "loader_cold_start_seconds": cold_start,
        "loader_cold_tokens_per_second": cold,
        "loader_warm_start_seconds": warm_start,
        "loader_warm_tokens_per_second": warm,
    }


def main() -> None:
    """Measures preparation and loader."""
    parser = ArgumentParser(
        prog="python -m data.text.bench_data",
        description="Measure preparation and loader beside tiktoken.",
        epilog="example: python -m data.text.bench_data --size 2200",
    )
    parser.add_argument(
        "--size", type=integer(10), default=200, metavar="MB", help="of the text (default: %(default)s)"
    )
    parser.add_argument("--text", metavar="FILE", help="a text to make it of (default: our own stories)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    refuse_missing_folder(options.json)
    source = stream(options.text, "train") if options.text else None
    material = list(islice(stories(SEED), STORIES))
    if source:
        material = [piece.text for chunk in source.chunks() for piece in chunk.pieces]

    found = measure(options.size * 1_000_000, material)
    if options.json:
        with atomic_write(options.json, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    tiktoken = [found[f"tiktoken_bytes_per_second_{when}"] / 1e6 for when in ("before", "after")]
    print(
        f"\ntext         {found['text_bytes'] / 1e6:,.0f} MB, {found['tokens'] / 1e6:,.1f}M tokens"
        f"\ntiktoken     {tiktoken[0]:.1f} MB/s on one core before the preparation, {tiktoken[1]:.1f} MB/s after it"
        f"\npreparation  {found['prepare_bytes_per_second'] / 1e6:.1f} MB/s on {found['cores']} cores: "
        f"{found['prepare_over_tiktoken_times_cores']:.2f} x tiktoken x cores; "
        f"{found['prepare_seconds']:.1f} s, {found['prepare_peak_bytes'] / 1e6:,.0f} MB of memory at most, "
        f"{found['prepare_cpu_seconds'] / found['prepare_seconds']:.1f} cores busy"
    )
    for state in ("cold", "warm"):
        rate = found[f"loader_{state}_tokens_per_second"] / 1e6
        first = found[f"loader_{state}_start_seconds"]
        shape = f"{BATCH_SIZE} x {SEQ_LEN}"
        print(f"loader, {state} {rate:.1f}M tokens/s in batches of {shape}, the first after {first:.2f} s")


if __name__ == "__main__":
    run(main)
