"""`python -m tinygrad_impl.tests.fuzz`: every file that the project reads, damaged in thousands of ways.

Whatever reads it has to refuse it in one sentence, or to find in it exactly what was in the undamaged file: no
traceback, no hang, no more than a gigabyte of memory, and no wrong number. Of metrics.jsonl the last lines may be lost,
as a run that was killed loses them. A folder without SHA256SUMS, such as the hub's, cannot be told from one with other
weights, epsilon or heads: of it, the arrays have to be the file's bytes, in the right shapes, and its tokenizer, which
may be another now, has to have tokens for a text, and a text for tokens. A damaged text is another text, if it can be
read: then the same pieces have to follow from every place where reading may go on.
"""

import gzip
import io
import json
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import CONFIG, INDEX, WEIGHTS, load, save
from data.checkpoints.config import GPT2Config, to_hf
from data.checkpoints.initialize import initial_weights
from data.checkpoints.tensors import write_safetensors
from data.cli import ArgumentParser, InputError, Progress, integer, run
from data.runs.comparison import add_measures, sample
from data.runs.options import UNRECORDED, parse, parser
from data.runs.report import report_page
from data.runs.report_input import load_run
from data.runs.run_folder import RunFolder, load_checkpoint, sampling_of, write_sealed
from data.testing import own_tokenizer, write_files
from data.text.formats import Reading
from data.text.loader import Loader, windows
from data.text.sampling import SAMPLING
from data.text.shards import SPLITS, ShardWriter, open_split, read_meta, tokenizer_of, verify_folder, write_meta
from data.text.sources import stream
from data.text.tokenizer import EOT_TEXT, from_files, gpt2, of_folder

SMALL = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2)
MEMORY = 1 << 30
SECONDS = 20
LENGTHS = [0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"1e999", b"-1", b"0", b"NaN", b"Infinity", b"null", b"{}", b"[]", b'""', b"true", b"9" * 400, b"[" * 3000]


@dataclass(frozen=True)
class Target:
    """A file of a folder, and what reads it: a function of the folder, whose results are compared."""

    folder: str
    file: str
    read: Callable[[Path], Any]


def read_prepared(folder: Path) -> Any:
    verify_folder(folder)
    loader = Loader(folder, "train", 2, 8, seed=0)
    batches = [loader.next_batch() for _ in range(4)]
    tokenizer = tokenizer_of(folder)
    said = tokenizer.sha256, tokenizer.eot, tokenizer.vocab_size
    return batches, list(windows(folder, "valid", 2, 8)), loader.state(), said


def read_tokenizer(folder: Path) -> Any:
    tokenizer = of_folder(folder)
    for special in (False, True):
        tokens = tokenizer.encode("One naïve day</s>, 🐻", special)
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.encode_documents(["One day"], special)[-1] == tokenizer.eot
        following = tokenizer.incremental(tokens)
        assert isinstance(tokenizer.decode(range(300)) + "".join(map(following, [*range(300), None])), str)
    return 0 <= tokenizer.eot < tokenizer.vocab_size <= 1000, len(tokenizer.sha256 + tokenizer.special_sha256)


def read_token_files(folder: Path) -> Any:
    """Of llm.c's: they have no checksums, so what is read has to be the file's bytes, and as many as before."""
    verify_folder(folder)
    for split in SPLITS:
        for shard in open_split(folder, split):
            if Path(str(shard.filename)).read_bytes()[1024:] != shard.tobytes():
                return f"{shard.filename} is not what the file has"
    return read_meta(folder)["splits"]


def read_weights(folder: Path) -> Any:
    config, arrays = load(folder)
    if (folder / WEIGHTS).exists():
        raw = (folder / WEIGHTS).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for name, array in arrays.items():
            begin, end = header[name]["data_offsets"]
            if header[name]["dtype"] == "F32" and array.tobytes() != raw[start + begin : start + end]:
                return f"{name} is not what the file has"
    return (config.vocab_size, config.n_positions, config.n_embd, config.n_layer), {
        n: a.shape for n, a in arrays.items()
    }


def read_text(name: str, folder: Path) -> Any:
    text = stream(str(folder / name), "train", Reading(errors="replace" if "replace" in name else "strict"))
    assert text
    chunks = list(text.chunks())
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    for i, chunk in enumerate(chunks):
        rest = [piece for other in chunks[i + 1 :] for piece in other.pieces]
        if chunk.end.offset and [piece for other in text.chunks(chunk.end) for piece in other.pieces] != rest:
            return f"from {chunk.end} on, other pieces follow"
    return "without a piece" if not pieces else "text"


def write_texts(folder: Path) -> list[Target]:
    """A text in every format, long enough for several chunks."""
    texts = [f"Line {i} of \u65e5\u672c.\n" * (i % 40 + 1) for i in range(120)]
    jsonl = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    csv = b"id,text\n" + b"".join(b'%d,"%s"\n' % (i, text.encode()) for i, text in enumerate(texts))
    column = io.BytesIO()
    parquet = import_module("pyarrow.parquet")
    parquet.write_table(import_module("pyarrow").table({"text": texts}), column, row_group_size=50)
    txt = EOT_TEXT.join(texts).encode()
    files = {"a.txt": txt, "replace.txt": txt, "a.txt.gz": gzip.compress(txt), "a.jsonl": jsonl, "a.csv": csv}
    files |= {"a.jsonl.zst": import_module("zstandard").compress(jsonl), "replace.jsonl": jsonl}
    files |= {"a.json": json.dumps(texts).encode(), "a.parquet": column.getvalue()}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [Target(folder.name, name, partial(read_text, name)) for name in files]


def read_run(folder: Path) -> Any:
    """All that resuming reads, and then what it left of the metrics; and what the report shows, whose page is made."""
    given = parse(parser("fuzz", "none"), ["--resume", str(folder)])
    sampling = sampling_of(folder)
    shown = load_run(folder)
    report_page([shown, shown])
    checkpoint = load_checkpoint(folder / "checkpoints" / "step-2")
    state = checkpoint[3]
    resumed = RunFolder.resume(folder, state, {"step": 2, "command": []})
    if any(found != row(int(found["step"])) for found in shown.metrics):
        return "a line that was never written"
    facts = {name: value for name, value in given.items() if name not in ("out", "resume")}
    return facts, sampling, shown.facts, shown.metrics[:3], shown.parity, shown.comparison, checkpoint, resumed.metrics


def row(step: int) -> dict[str, Any]:
    """Of metrics.jsonl."""
    measured = {"loss": 4 - step / 9, "lr": 0.1, "grad_norm": 1.0} if step else {}
    return {"step": step, "tokens": step, "seconds": step / 3, "val_loss": 3 - step / 7} | measured


def build(root: Path) -> list[Target]:
    """Small folders of every kind in `root`, and the files in them."""
    tokens = np.random.default_rng(0).integers(0, 50257, 300).astype(np.uint16)
    own = from_files("own", own_tokenizer(), None)
    for name, tokenizer, its in (("prepared", gpt2(), tokens), ("prepared-own", own, tokens % 300)):
        (root / name).mkdir()
        splits = {}
        for split, part in {"train": its[:200], "valid": its[200:]}.items():
            with ShardWriter(root / name, split, 120, vocabulary=tokenizer.vocab_size) as writer:
                writer.write(part)
            splits[split] = {"source": "", "documents": 1, "tokens": len(part), "shards": writer.shards}
        write_meta(root / name, splits, tokenizer)
    config = {"config.json": json.dumps({"vocab_size": 1000, "eos_token_id": 0})}
    described = json.loads(own.files()["tokenizer.json"])["model"]
    older = {"vocab.json": json.dumps(described["vocab"]), "added_tokens.json": '{"<x>": 300}'}
    older |= {"merges.txt": "\n".join(" ".join(pair) for pair in described["merges"])}
    older |= {"special_tokens_map.json": '{"eos_token": "</s>", "additional_special_tokens": ["<x>"]}'}
    write_files(root / "own", config | own.files())
    write_files(root / "older", config | older)

    (root / "tokens").mkdir()
    for split, part in {"train": tokens[:200], "val": tokens[200:]}.items():
        header = np.array([20240520, 1, len(part), *[0] * 253], "<i4")
        (root / "tokens" / f"x_{split}_0.bin").write_bytes(header.tobytes() + part.tobytes())

    arrays = initial_weights(SMALL, 0)
    save(root / "weights", SMALL, arrays)
    (root / "sharded").mkdir()
    names = list(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, those in parts.items():
        write_safetensors(root / "sharded" / shard, {name: arrays[name] for name in those}, {"format": "pt"})
    weight_map = {name: shard for shard, those in parts.items() for name in those}
    (root / "sharded" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (root / "sharded" / CONFIG).write_text(json.dumps(to_hf(SMALL)))

    options: dict[str, Any] = {
        name: None for name in vars(parser("fuzz", "none").parse_args([])) if name not in UNRECORDED
    }
    options |= {"preset": "tiny", "steps": 4, "lr": 0.001, "betas": [0.9, 0.95], "seed": 7, "tensorboard": False}
    options |= {"schedule": ["0-3", "3-4"]}  # trained longer
    facts = {"command": ["python"], "options": options, "parameters": 9, "device": "CPU", "card": "", "versions": {}}
    facts |= {"config": to_hf(SMALL), "data": {"folder": "", "checksum": ""}, "weights": ""}
    facts |= {
        "sampling": SAMPLING | {"seed": 7},
        "continued": [{"step": 2, "command": [], "changed": {"steps": [3, 4]}}],
    }
    out = RunFolder.create(root / "run", facts)
    parity: dict[str, Any] = {
        "verdict": "equal",
        "culprit": None,
        "summary": "",
        "dtype": "float32",
        "device": "CPU",
        "versions": {},
    }
    write_sealed(out.path / "parity.json", parity | {"model": {"sha256": ""}, "sources": {}, "rows": []})
    compared: dict[str, Any] = {"models": [{"name": "", "loss": 2.0, "perplexity": 7.5}] * 2, "training_text": None}
    compared |= {"data": "", "tokens": 9, "seq_len": 4, "sampling": {}}
    compared["texts"] = [{"prompt": "a", "models": [{"samples": [sample([("b", 0.5)], ended=True)]}] * 2}]
    add_measures(compared)
    write_sealed(out.path / "compare.json", compared)
    for step in range(5):
        out.add_metrics(row(step))
        out.add_sample(step, f"A text of step {step}.")
        if step in (0, 2):
            state = {"step": step, "tokens": step, "seconds": 0.5, "loader": {"position": step}, "options": options}
            moments = {f"{m}.{name}": a + step for m in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
            out.save_checkpoint(SMALL, arrays, moments, state)

    targets = write_texts(root / "texts")
    targets += [Target(n, p.name, read_prepared) for n in ("prepared", "prepared-own") for p in (root / n).iterdir()]
    targets += [
        Target(name, path.name, read_tokenizer) for name in ("own", "older") for path in (root / name).iterdir()
    ]
    targets += [Target("tokens", f"x_{split}_0.bin", read_token_files) for split in ("train", "val")]
    targets += [Target("weights", name, read_weights) for name in (CONFIG, WEIGHTS)]
    targets += [Target("sharded", name, read_weights) for name in (INDEX, "a.safetensors")]
    of_run = ["run.json", "metrics.jsonl", "samples.md", "parity.json", "compare.json", "checkpoints/latest"]
    of_run += [f"checkpoints/step-2/{path.name}" for path in (out.path / "checkpoints" / "step-2").iterdir()]
    return targets + [Target("run", name, read_run) for name in of_run]


def damaged(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done to it, and the outcome."""
    kinds = ["bits", "truncated", "header", "length", "bytes", "extended", "cut out", "word", "empty", "doubled"]
    kind, data = chance.choices(kinds, [8, 3, 2, 2, 3, 1, 2, 4, 0.3, 0.5])[0], bytearray(content)
    at = chance.randrange(len(data)) if data else 0
    match kind if data else "extended":
        case "bits":
            for _ in range(chance.choice([1, 1, 1, 2, 8])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "truncated":
            del data[at:]
        case "header":
            for i in range(min(len(data), chance.choice([1, 4, 8, 64]))):
                data[i] = chance.randrange(256)
        case "length":  # of a safetensors header, of a shard, or somewhere
            at = chance.choice([0, 8, 12, 16, at])
            data[at : at + 8] = chance.choice(LENGTHS).to_bytes(8, "little")
        case "bytes":
            data[at : at + 16] = chance.randbytes(min(16, len(data) - at))
        case "extended":
            data += chance.randbytes(chance.choice([1, 8, 5000]))
        case "cut out":
            del data[at : at + chance.choice([1, 2, 64])]
        case "word":  # in place of a value of JSON
            ends = [i for i, byte in enumerate(data[:20000]) if byte in b",}]"] or [at]
            end = chance.choice(ends)
            begin = max(data.rfind(b":", 0, end), data.rfind(b",", 0, end), data.rfind(b"[", 0, end)) + 1
            data[begin:end] = chance.choice(WORDS)
        case "empty":
            data.clear()
        case "doubled":
            data += bytes(data)
    return kind, bytes(data)


def same(a: Any, b: Any) -> bool:
    """Equal, bit by bit in arrays, and of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def out_of_time(number: int, frame: object) -> None:
    raise TimeoutError(f"still reading after {SECONDS} s")


def fuzz(count: int, seed: int, quiet: bool = False) -> tuple[Counter[str], list[str]]:
    """Reads `count` damaged files. Returns how they ended, and what should not have been."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    chance = random.Random(seed)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory() as temporary:
        whole_ones, place = Path(temporary, "whole"), Path(temporary, "place")
        whole_ones.mkdir()
        targets = build(whole_ones)
        shutil.copytree(whole_ones, place)
        expected = {}
        for target in targets:  # the run is changed by its reading, so anew each time
            shutil.rmtree(place / target.folder)
            shutil.copytree(whole_ones / target.folder, place / target.folder)
            expected[target] = target.read(place / target.folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
            for i in Progress(iterable=range(count), desc="fuzz", unit="file", disable=quiet):
                target = targets[i % len(targets)]
                folder = place / target.folder
                shutil.rmtree(folder)
                shutil.copytree(whole_ones / target.folder, folder)
                content = (folder / target.file).read_bytes()
                kind, changed = damaged(content, chance)
                if changed == content:
                    ends["unchanged"] += 1
                    continue
                (folder / target.file).write_bytes(changed)
                what = f"{target.folder}/{target.file}, {kind} (seed {seed}, number {i})"
                signal.alarm(SECONDS)
                try:
                    found = target.read(folder)
                except InputError as e:
                    ends["refused"] += 1
                    if "\n" in str(e) or len(str(e)) > 1500:
                        faults.append(f"{what}: not one sentence: {str(e)[:200]!r}")
                except BaseException as e:
                    if isinstance(e, KeyboardInterrupt):
                        raise
                    faults.append(f"{what}: {type(e).__name__}: {str(e)[:200]}")
                else:
                    harmless = same(found, expected[target])
                    ends["harmless"] += harmless
                    if not harmless:
                        faults.append(f"{what}: read as something else")
                finally:
                    signal.alarm(0)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            signal.signal(signal.SIGALRM, handler)
    return ends, faults


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tinygrad_impl.tests.fuzz",
        description="Damage every file that the project reads, in thousands of ways, and see how each ends.",
        epilog="example: python -m tinygrad_impl.tests.fuzz --count 10000",
    )
    parser.add_argument("--count", type=integer(1), default=1000, metavar="N", help="damaged files (1000)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the damage")
    args = parser.parse_args()
    ends, faults = fuzz(args.count, args.seed)
    for fault in faults[:50]:
        print(fault)
    print(f"{args.count} files: " + ", ".join(f"{n} {end}" for end, n in ends.items()) + f"; {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    run(main)
