"""The options of training: which values they take, what each is unless given, and what depends on what."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

import data.runs.start
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import PRESETS, GPT2Config
from data.checkpoints.initialize import initial_weights
from data.cli import InputError
from data.runs.options import SIZES, Given, Options, parse, parser
from data.runs.run_folder import write_sealed
from data.runs.start import complete
from data.runs.tests.support import TINY, Stub, metrics, options, trained, training
from data.testing import call, refused, write_stories, write_tokens


def given(*argv: object) -> Given:
    return parse(parser("train", "numbers"), [str(word) for word in argv])


def completed(*argv: object, device: str = "CPU") -> Options:
    return complete(given(*argv), device)[0]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> dict[str, GPT2Config]:
    """The presets, of the same contexts, but narrow and each of another width."""
    widths = {name: 4 * i for i, name in enumerate(PRESETS, 1)}
    for name, preset in list(PRESETS.items()):
        small = GPT2Config(vocab_size=61, n_positions=preset.n_positions, n_embd=widths[name], n_layer=1, n_head=1)
        monkeypatch.setitem(PRESETS, name, small)
    return PRESETS


# batch size, sequence length, steps, lr of random weights, of given ones, warmup, tokens to validate on, betas, range
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "tiny": (8, 32, 450, 7e-3, 7e-4, 90, 2048, (0.8, 0.99), 0.06),
    "tinystories": (64, 256, 4000, 1e-3, 1e-4, 100, 0, (0.9, 0.95), 0.02),
    "gpt2": (8, 1024, 4000, 6e-4, 6e-5, 100, 262144, (0.9, 0.95), 0.02),
    "gpt2-medium": (4, 1024, 4000, 3e-4, 3e-5, 100, 262144, (0.9, 0.95), 0.02),
    "gpt2-large": (2, 1024, 4000, 2.5e-4, 2.5e-5, 100, 262144, (0.9, 0.95), 0.02),
    "gpt2-xl": (1, 1024, 4000, 2e-4, 2e-5, 100, 262144, (0.9, 0.95), 0.02),
}


def defaults(preset: str, lr: float) -> dict[str, Any]:
    batch_size, seq_len, steps, _, _, warmup, eval_tokens, betas, _ = DEFAULTS[preset]
    found = {"data": "stories", "steps": steps, "batch_size": batch_size, "seq_len": seq_len, "grad_accum": 1}
    found |= {"valid": None, "field": "text", "errors": "strict"}
    found |= {"lr": lr, "min_lr": lr / 10, "warmup": warmup, "weight_decay": 0.1, "betas": betas, "clip": 1.0}
    found |= {"dtype": "float32", "seed": 1337, "device": None, "eval_every": steps // 10, "eval_tokens": eval_tokens}
    found |= {"sample_every": steps // 4, "save_every": steps // 4, "keep": None, "tensorboard": False, "quiet": False}
    found |= {"schedule": None, "rewarm": False, **dict.fromkeys(SIZES)}
    found |= {"resume_if_any": False, "global_batch_tokens": None, "reduce_dtype": None, "zero": None, "timeout": 600}
    found |= {"gpus": None, "eval_tasks": None, "eval_limit": 100, "recipe": None}
    found |= {"eval_data_file": None, "eval_tasks_every": None}
    return found | {"out": None, "resume": None, "config": None, "find_lr": False, "parity": None, "kernels": None}


def test_the_presets_are_all_there() -> None:
    assert list(DEFAULTS) == list(PRESETS)


@pytest.mark.parametrize("preset", DEFAULTS)
def test_defaults_of_a_preset(preset: str, narrow: dict[str, GPT2Config]) -> None:
    args, config, arrays = complete(given("--preset", preset), "CPU")
    assert vars(args) == defaults(preset, DEFAULTS[preset][3]) | {"preset": preset, "init": "random"}
    assert config == narrow[preset]
    expected = initial_weights(config, 1337, DEFAULTS[preset][-1])
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("preset", DEFAULTS)
def test_defaults_of_given_weights(preset: str, narrow: dict[str, GPT2Config], tmp_path: Path) -> None:
    """Those of the preset of their size."""
    weights = initial_weights(narrow[preset], 5)
    save(tmp_path / "init", narrow[preset], weights)
    args, config, arrays = complete(given("--init", tmp_path / "init"), "CPU")
    expected = defaults(preset, DEFAULTS[preset][4]) | {"preset": None, "init": str(tmp_path / "init")}
    assert vars(args) == expected
    assert config == narrow[preset]
    np.testing.assert_array_equal(arrays["wte.weight"], weights["wte.weight"])


def test_weights_of_another_size_train_as_gpt2_within_their_context(tmp_path: Path) -> None:
    weights = {name: array.astype(np.float64) for name, array in initial_weights(TINY, 5).items()}
    save(tmp_path / "init", TINY, weights)
    args, _, arrays = complete(given("--init", tmp_path / "init"), "CPU")
    assert (args.batch_size, args.seq_len, args.lr, args.steps) == (8, 32, 6e-5, 4000)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_a_preset_may_be_named_beside_weights_of_its_size(narrow: dict[str, GPT2Config], tmp_path: Path) -> None:
    save(tmp_path / "init", narrow["gpt2-medium"], initial_weights(narrow["gpt2-medium"], 5))
    assert completed("--init", tmp_path / "init", "--preset", "gpt2-medium").lr == 3e-5
    with pytest.raises(InputError, match=r"init are of another size than preset gpt2; leave out one of them"):
        completed("--init", tmp_path / "init", "--preset", "gpt2")


@pytest.mark.parametrize(
    ("steps", "warmup", "eval_every", "others"),
    [(1, 0, 1, 1), (3, 0, 1, 1), (37, 7, 3, 9), (449, 89, 44, 112), (499, 99, 49, 124), (1999, 100, 199, 499)],
)
def test_what_follows_from_the_steps(
    steps: int, warmup: int, eval_every: int, others: int, narrow: dict[str, GPT2Config]
) -> None:
    args = completed("--preset", "gpt2", "--steps", steps)
    assert (args.warmup, args.eval_every, args.sample_every, args.save_every) == (warmup, eval_every, others, others)


def test_sizes_of_ones_own(narrow: dict[str, GPT2Config]) -> None:
    """In place of the preset's, whose recipe stays; the windows follow the context."""
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 6, "n_positions": 40}
    words = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    args, config, arrays = complete(given("--preset", "tiny", *words), "CPU")
    assert config == replace(narrow["tiny"], n_layer=3, n_head=2, n_embd=6, n_positions=40)
    assert (args.seq_len, args.batch_size, args.lr, args.steps) == (40, 8, 7e-3, 450)
    assert {name: value for name, value in args.recorded().items() if name in sizes} == sizes
    expected = initial_weights(config, 1337, 0.06)
    assert arrays.keys() == expected.keys()
    np.testing.assert_array_equal(arrays["wpe.weight"], expected["wpe.weight"])
    alone = complete(given("--n-layer", 2, "--seq-len", 9), "CPU")
    assert alone[1] == replace(narrow["tiny"], n_layer=2)
    assert alone[0].seq_len == 9


def test_a_gpu_takes_sizes_for_random_weights(narrow: dict[str, GPT2Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a preset: it does not ask for OpenAI's weights, which have sizes of their own."""
    monkeypatch.setattr(data.runs.start, "resolve", unreachable)
    args, config, _ = complete(given("--n-layer", 2), "CUDA")
    assert (args.preset, args.init, config.n_layer) == ("tinystories", "random", 2)


@pytest.mark.parametrize(
    ("before", "seq_len", "trained"),
    [("random", 9, 9), ("random", 32, None), (None, 9, None), (20, 9, 20), (20, 25, 25), (20, 32, None)],
)
def test_the_model_knows_to_what_length_it_was_trained(
    before: Any, seq_len: int, trained: int | None, narrow: dict[str, GPT2Config], tmp_path: Path
) -> None:
    """Weights from elsewhere count as trained to their whole context."""
    init = str(before)
    if before != "random":
        init = str(tmp_path)
        save(tmp_path, replace(TINY, trained_positions=before), initial_weights(TINY, 5))
    config = complete(given("--init", init, "--seq-len", seq_len), "CPU")[1]
    assert (config.n_positions, config.trained_positions, config.context) == (32, trained, trained or 32)
    save(tmp_path / "saved", config, initial_weights(config, 0))
    assert load(tmp_path / "saved")[0].trained_positions == trained
    assert ("trained_positions" in (tmp_path / "saved" / "config.json").read_text()) == bool(trained)


def test_the_smallest_rate_follows_from_the_highest(narrow: dict[str, GPT2Config]) -> None:
    assert completed("--preset", "gpt2", "--lr", 0.5).min_lr == 0.05
    assert completed("--preset", "gpt2", "--lr", 0.5, "--min-lr", 0).min_lr == 0


@pytest.mark.parametrize(("device", "dtype"), [("CPU", "float32"), ("CUDA", "bfloat16"), ("METAL", "float32")])
def test_the_dtype_of_a_device(device: str, dtype: str, narrow: dict[str, GPT2Config]) -> None:
    assert completed("--preset", "tiny", device=device).dtype == dtype
    assert completed("--preset", "tiny", "--dtype", "float32", device=device).dtype == "float32"


ALL = [
    ("--preset", ["gpt2"], "gpt2"),
    ("--n-layer", ["3"], 3),
    ("--n-head", ["2"], 2),
    ("--n-embd", ["6"], 6),
    ("--n-positions", ["25"], 25),
    ("--init", ["random"], "random"),
    ("--data", ["mine.txt", "yours.txt"], "mine.txt,yours.txt"),
    ("--valid", ["0.2"], "0.2"),
    ("--field", ["story"], "story"),
    ("--errors", ["replace"], "replace"),
    ("--out", ["there"], Path("there")),
    ("--steps", ["17"], 17),
    ("--batch-size", ["3"], 3),
    ("--seq-len", ["21"], 21),
    ("--grad-accum", ["5"], 5),
    ("--lr", ["0.03"], 0.03),
    ("--find-lr", [], True),
    ("--min-lr", ["0.0001"], 0.0001),
    ("--warmup", ["0"], 0),
    ("--schedule", ["0-9", "10-17"], ("0-9", "10-17")),
    ("--weight-decay", ["0"], 0.0),
    ("--betas", ["0.7", "0.8"], (0.7, 0.8)),
    ("--clip", ["0.3"], 0.3),
    ("--dtype", ["bfloat16"], "bfloat16"),
    ("--reduce-dtype", ["bfloat16"], "bfloat16"),
    ("--zero", ["0"], 0),
    ("--timeout", ["30"], 30),
    ("--seed", ["0"], 0),
    ("--device", ["METAL"], "METAL"),
    ("--eval-every", ["2"], 2),
    ("--eval-tokens", ["0"], 0),
    ("--eval-tasks", ["stories"], "stories"),
    ("--eval-data-file", ["own.jsonl"], "own.jsonl"),
    ("--eval-limit", ["0"], 0),
    ("--eval-tasks-every", ["0"], 0),
    ("--sample-every", ["4"], 4),
    ("--save-every", ["6"], 6),
    ("--keep", ["7"], 7),
    ("--tensorboard", [], True),
    ("--quiet", [], True),
]


def test_what_is_given_is_not_replaced(narrow: dict[str, GPT2Config]) -> None:
    """Every option but --find-lr, which excludes others, at a value that is no default, 0 where it may be: it stays
    what it was.
    """
    together = [row for row in ALL if row[0] != "--find-lr"]
    args = completed(*(word for option, words, _ in together for word in (option, *words)), device="CUDA")
    expected = {option[2:].replace("-", "_"): value for option, _, value in together}
    expected |= {"find_lr": False, "rewarm": False, "resume": None, "config": None, "parity": None, "kernels": None}
    assert vars(args) == expected | {"global_batch_tokens": None, "resume_if_any": False, "gpus": None, "recipe": None}


BOUNDS = [
    *((size, "0", "0 is not a whole number of at least 1", "1") for size in ("--n-layer", "--n-head", "--n-embd")),
    ("--n-positions", "0", "0 is not a whole number of at least 1", "1"),
    ("--steps", "0", "0 is not a whole number of at least 1", "1"),
    ("--batch-size", "0", "0 is not a whole number of at least 1", "1"),
    ("--batch-size", "2.5", "2.5 is not a whole number of at least 1", "2"),
    ("--seq-len", "0", "0 is not a whole number of at least 1", "1"),
    ("--grad-accum", "0", "0 is not a whole number of at least 1", "1"),
    ("--lr", "0", "0 is not a number above 0", "1e-9"),
    ("--lr", "nan", "nan is not a number above 0", "5"),
    ("--min-lr", "-1", "-1 is not a number of at least 0", "0"),
    ("--min-lr", "inf", "inf is not a number of at least 0", "0.1"),
    ("--warmup", "-1", "-1 is not a whole number of at least 0", "0"),
    ("--weight-decay", "inf", "inf is not a number of at least 0", "0"),
    ("--clip", "0", "0 is not a number above 0", "1e-9"),
    ("--seed", "-1", "-1 is not a whole number of at least 0", "0"),
    ("--eval-every", "0", "0 is not a whole number of at least 1", "1"),
    ("--eval-tokens", "-1", "-1 is not a whole number of at least 0", "0"),
    ("--sample-every", "0", "0 is not a whole number of at least 1", "1"),
    ("--save-every", "0", "0 is not a whole number of at least 1", "1"),
    ("--global-batch-tokens", "0", "0 is not a whole number of at least 1", "1"),
    ("--timeout", "0", "0 is not a whole number of at least 1", "1"),
    ("--zero", "2", "invalid choice: 2", "1"),
    ("--reduce-dtype", "float16", "invalid choice: 'float16'", "bfloat16"),
    ("--keep", "0", "0 is not a whole number of at least 1", "1"),
    ("--dtype", "float16", "invalid choice: 'float16'", "bfloat16"),
    ("--errors", "ignore", "invalid choice: 'ignore'", "replace"),
    ("--preset", "huge", "invalid choice: 'huge'", "tiny"),
]


@pytest.mark.parametrize(("option", "wrong", "error", "right"), BOUNDS)
def test_the_edge_of_what_an_option_takes(option: str, wrong: str, error: str, right: str) -> None:
    given(option, right)
    with pytest.raises(InputError) as raised:
        given(option, wrong)
    assert f"argument {option}: " in str(raised.value)
    assert error in str(raised.value)
    assert str(raised.value).endswith("; see `train --help`")


def test_betas_are_two_numbers_from_0_to_below_1() -> None:
    assert given("--betas", "0", "0.999")["betas"] == (0.0, 0.999)
    for wrong in (("0.9", "1"), ("1", "0.9"), ("-0.1", "0.9")):
        with pytest.raises(InputError, match="--betas"):
            given("--betas", *wrong)
    with pytest.raises(InputError, match=r"--betas: expected 2 arguments; see `train --help`"):
        given("--betas", "0.9")


def test_help_names_the_framework() -> None:
    text = parser("python -m some.train", "tinygrad").format_help()
    assert "Train GPT-2 in tinygrad. Without options: the best preset for this machine." in text
    assert "python -m some.train --preset tinystories" in text
    assert all(option in text for option, _, _ in ALL)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "presets layers heads width context parameters batch x window steps" in rows
    assert "tiny 2 4 64 32 3.3M 8 x 32 450" in rows
    assert "gpt2-xl 48 25 1600 1024 1,557.6M 1 x 1024 4000" in rows


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.02, "min_lr": 0.03}, "--min-lr 0.03 is above --lr 0.02; give a smaller one"),
        ({"seq_len": 33}, "--seq-len 33 is over the model's context of 32 tokens; give fewer"),
        ({"n_layer": 2}, "--n-layer is for random weights, and init has its own; leave that out"),
        ({"n_positions": 2, "n_head": 2}, "--n-head and --n-positions are for random weights, and init has its own; "),
        ({"init": None, "n_head": 5}, "n_embd 64 does not divide into n_head 5 heads; choose a multiple of n_head"),
        ({"init": None, "n_embd": 99999}, "n_embd is 99999; it has to be a whole number from 1 to 65536"),
        ({"init": None, "n_positions": 7}, "--seq-len 8 is over the model's context of 7 tokens; give fewer"),
        ({"preset": "tiny"}, "the weights of init are of another size than preset tiny; leave out one of them"),
        ({"batch_size": 5000}, "62 windows of 8 tokens, fewer than the 10000 of a batch"),
        ({"data": "nowhere.txt"}, "there is no file nowhere.txt"),
        ({"data": "nowhere"}, "'nowhere' is not a source of text"),
        ({"data": "init"}, "init is no folder of prepared data (it has no meta.json)"),
        ({"init": "./nowhere"}, "there is no folder ./nowhere"),
        ({"learning": 1}, "--learning"),
        ({"out": "init"}, "init is there and is not empty"),
        ({"out": "data/meta.json"}, "data/meta.json is there and is not empty"),
    ],
)
def test_options_that_do_not_go_together(changed: dict[str, object], words: str, stub: Stub, place: Path) -> None:
    before = sorted(os.listdir(place))
    refused(training(stub, place, **{"out": "refused"} | changed), words)  # type: ignore[arg-type]
    assert sorted(os.listdir(place)) == before  # no folder was left
    assert not stub.stepped


def test_the_edges_of_what_goes_together(stub: Stub, place: Path, tmp_path: Path) -> None:
    trained(stub, place, tmp_path / "run", lr=0.02, min_lr=0.02, seq_len=32, steps=1, batch_size=1)


def test_a_run_is_not_written_over(stub: Stub, place: Path, tmp_path: Path) -> None:
    """Which is found before anything that takes long."""
    trained(stub, place, tmp_path / "run", steps=1)
    before = (tmp_path / "run" / "run.json").read_bytes()
    stub.stepped.clear()
    words = f"{tmp_path}/run holds a run; pass `--resume {tmp_path}/run --steps 2` to train it longer than its 1 step, "
    refused(training(stub, place, tmp_path / "run", data="not looked for"), words + "or another --out")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-0\n")  # as while it trains
    words = f"{tmp_path}/run holds a run; pass `--resume {tmp_path}/run` to continue it, or another --out"
    refused(training(stub, place, tmp_path / "run", data="not looked for"), words)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert not stub.stepped


def test_text_is_prepared(stub: Stub, place: Path, tmp_path: Path) -> None:
    write_stories(tmp_path / "stories.txt")
    result = trained(stub, tmp_path, "run", init=place / "init", data="stories.txt", steps=1)
    assert "preparing stories.txt in runs/data/stories-" in result.out
    again = trained(stub, tmp_path, "again", init=place / "init", data="stories.txt", steps=1)
    assert "preparing" not in again.out


def test_what_is_held_out_and_read(stub: Stub, place: Path, tmp_path: Path) -> None:
    """--valid, --field and --errors decide what is prepared, and are repeated with the run."""
    texts = [f"It is story number {i}, and a long one." for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"story": "%s \xff"}\n' % text.encode() for text in texts))
    (tmp_path / "exam.jsonl").write_text('{"story": "An exam: one, two, three."}')
    settings = {"init": place / "init", "data": "a.jsonl", "field": "story", "errors": "replace", "steps": 1}
    trained(stub, tmp_path, "one", **settings, valid="0.4")
    half = json.loads((tmp_path / stub.start.folder / "meta.json").read_text())["splits"]
    assert (half["valid"]["source"], half["train"]["errors"]) == ("0.4 of a.jsonl", "replace")
    trained(stub, tmp_path, "two", **settings, valid="exam.jsonl")
    exam = json.loads((tmp_path / stub.start.folder / "meta.json").read_text())["splits"]
    assert exam["valid"]["source"] == "exam.jsonl"
    assert call(stub.main, "--config", "one", "--out", "three", cwd=tmp_path).code == 0
    assert json.loads((tmp_path / stub.start.folder / "meta.json").read_text())["splits"] == half
    # with another --valid it is other data, and meant to be
    assert call(stub.main, "--config", "one", "--out", "four", "--valid", "0.2", cwd=tmp_path).code == 0
    # and another --data has none of what was said of this one
    assert call(stub.main, "--config", "one", "--out", "five", "--data", place / "data", cwd=tmp_path).code == 0
    words = "is prepared already, so it goes without --valid, --field and --errors"
    refused(training(stub, place, tmp_path / "six", valid="0.4"), words)


def test_one_text_without_markers(stub: Stub, place: Path, tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50)
    result = trained(stub, tmp_path, "run", init=place / "init", data="play.txt", steps=1)
    assert "play.txt: one document, so its end is the validation text; --valid takes another" in result.out
    assert stub.start.loader.tokens > 500
    (tmp_path / "line.txt").write_text("To be, or not to be, that is the question.")
    short = training(stub, tmp_path, tmp_path / "short", init=place / "init", data="line.txt")
    assert len(short.errors) == 1
    assert "windows of 8 tokens, fewer than the 6 of a batch; give more text, or a smaller --seq-len" in short.errors[0]


def test_text_that_is_no_utf8(stub: Stub, place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("Olá. ".encode("latin-1") * 100)
    result = training(stub, place, tmp_path / "run", data=tmp_path / "text.txt")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "UTF-8" in result.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_model(missing: str, stub: Stub, place: Path, tmp_path: Path) -> None:
    save(tmp_path / "init", TINY, initial_weights(TINY, 0))
    (tmp_path / "init" / missing).unlink()
    refused(training(stub, place, tmp_path / "run", init=tmp_path / "init"), missing)


@pytest.mark.parametrize("changed", [{"init": "gpt2"}, {"data": "tinystories"}])
def test_the_hub_out_of_reach(
    changed: dict[str, str], stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(training(stub, place, tmp_path / "run", **changed), "hub cannot be reached")


# Without options


def test_without_options_a_cpu_trains_tiny(narrow: dict[str, GPT2Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.runs.start, "resolve", unreachable)
    args, config, _ = complete(given(), "CPU")
    assert (args.preset, args.init, args.data, args.dtype) == ("tiny", "random", "stories", "float32")
    assert config == narrow["tiny"]


@pytest.mark.parametrize("device", ["CUDA", "METAL"])
def test_without_options_a_gpu_fine_tunes_gpt2(
    device: str, narrow: dict[str, GPT2Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the command decides on such a machine; no GPU is needed for that."""
    save(tmp_path / "gpt2", narrow["gpt2"], initial_weights(narrow["gpt2"], 5))
    monkeypatch.chdir(tmp_path)  # where the name gpt2 finds a folder, it is not asked of the hub
    for argv, source in (((), "tinystories"), (("--data", "mine.txt"), "mine.txt")):
        args, _, arrays = complete(given(*argv), device)
        assert (args.preset, args.init, args.data, args.lr) == ("gpt2", "gpt2", source, 6e-5)
        np.testing.assert_array_equal(arrays["wte.weight"], load(tmp_path / "gpt2")[1]["wte.weight"])


def unreachable(name: str) -> Path:
    raise InputError(f"{name} cannot be reached")


def test_without_options_and_hub_a_gpu_trains_from_random(
    narrow: dict[str, GPT2Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.runs.start, "resolve", unreachable)
    args = completed(device="CUDA")
    assert (args.preset, args.init, args.data, args.lr) == ("tinystories", "random", "stories", 1e-3)
    said = "Without the pretrained gpt2 (gpt2 cannot be reached): preset tinystories, from random weights.\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("argv", [("--preset", "tiny"), ("--init", "random")])
def test_a_gpu_asks_the_hub_only_where_nothing_was_said(
    argv: tuple[str, str], narrow: dict[str, GPT2Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.runs.start, "resolve", unreachable)
    args = completed(*argv, device="CUDA")
    assert (args.preset, args.init) == ("tiny", "random")


# Damaged data


def changed_byte(name: str, at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("meta.json"), "it has no meta.json"),
        (without("train-00000.bin"), "train-00000.bin is missing"),
        (without("valid-00000.bin"), "valid-00000.bin is missing"),
        (lambda folder: os.truncate(folder / "train-00000.bin", 100), "train-00000.bin is truncated"),
        (changed_byte("train-00000.bin", 30), "train-00000.bin is not the one that its folder lists"),
        (changed_byte("train-00000.bin", 100), "train-00000.bin is corrupted"),  # a token: still in the vocabulary
        (changed_byte("valid-00000.bin", 100), "valid-00000.bin is corrupted"),
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"x" * 864), "train-00000.bin is no shard of tokens"),
        (
            lambda folder: (folder / "valid-00000.bin").write_bytes((folder / "train-00000.bin").read_bytes()),
            "valid-00000.bin is not the one that its folder lists",
        ),
        (lambda folder: (folder / "meta.json").write_bytes(b"{"), "meta.json is damaged"),
    ],
)
def test_damaged_data(damage: Callable[[Path], None], words: str, stub: Stub, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    damage(tmp_path / "data")
    refused(training(stub, place, tmp_path / "run", data=tmp_path / "data"), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_token_beyond_the_vocabulary(split: str, stub: Stub, place: Path, tmp_path: Path) -> None:
    tokens = {"train": np.arange(400), "valid": np.arange(400)}
    tokens[split] = tokens[split] + 50257
    write_tokens(tmp_path / "data", **tokens)
    result = training(stub, place, tmp_path / "run", data=tmp_path / "data")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "beyond the vocabulary of 50257" in result.errors[0]


def test_the_seed_decides_order_and_samples(stub: Stub, place: Path, tmp_path: Path) -> None:
    shown = {}
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        stub.stepped.clear()
        stub.sampled.clear()
        trained(stub, place, tmp_path / name, steps=1, seed=seed)
        shown[name] = stub.stepped[0][0][0][0].tolist(), stub.sampled[0][3].random.random()
    assert shown["a"] == shown["b"]
    assert shown["a"][0] != shown["c"][0]
    assert shown["a"][1] != shown["c"][1]
    assert len(metrics(tmp_path / "a")) == 2


def test_the_seed_decides_random_weights(narrow: dict[str, GPT2Config]) -> None:
    arrays = [complete(given("--preset", "tiny", "--seed", seed), "CPU")[2]["wte.weight"] for seed in (3, 4)]
    np.testing.assert_array_equal(arrays[0], initial_weights(narrow["tiny"], 3, 0.06)["wte.weight"])
    assert not np.array_equal(arrays[0], arrays[1])


def test_a_word_that_is_no_option(stub: Stub, place: Path) -> None:
    refused(call(stub.main, *options(), "--stepz", 3, cwd=place), "unrecognized arguments: --stepz 3")


# Several ranks


@pytest.mark.parametrize(
    ("tokens", "size", "batch_size", "expected"),
    [
        (960, 1, 8, (4, 8)),  # 32 windows of 30
        (960, 4, 8, (4, 8)),
        (960, 8, 8, (8, 4)),  # no more than a rank's share at a time
        (900, 2, 8, (6, 5)),  # 15 for each, of which 8 are no part
        (930, 1, 8, (31, 1)),
    ],
)
def test_the_global_batch_in_tokens(
    tokens: int, size: int, batch_size: int, expected: tuple[int, int], narrow: dict[str, GPT2Config]
) -> None:
    words = given("--preset", "tiny", "--seq-len", 30, "--batch-size", batch_size, "--global-batch-tokens", tokens)
    options = complete(words, "CPU", size)[0]
    assert (options.grad_accum, options.batch_size) == expected
    assert options.grad_accum * options.batch_size * 30 == tokens
    assert "global_batch_tokens" not in options.recorded()


@pytest.mark.parametrize(
    ("tokens", "size", "words"),
    [
        (1000, 1, "--global-batch-tokens 1000 is no multiple of --seq-len 30; give 990 or 1020"),
        (1000, 4, "--global-batch-tokens 1000 is no multiple of --seq-len 30, let alone for 4 ranks; give 960 or 1080"),
        (990, 4, "990 is 33 windows of --seq-len 30, which 4 ranks cannot share equally; give 960 or 1080"),
        (20, 1, "--global-batch-tokens 20 is no multiple of --seq-len 30; give 30"),
    ],
)
def test_a_global_batch_that_ranks_cannot_share(
    tokens: int, size: int, words: str, narrow: dict[str, GPT2Config]
) -> None:
    with pytest.raises(InputError) as raised:
        complete(given("--preset", "tiny", "--seq-len", 30, "--global-batch-tokens", tokens), "CPU", size)
    assert str(raised.value).endswith(words)


def test_the_default_is_a_micro_batch_for_each_rank(narrow: dict[str, GPT2Config]) -> None:
    options = complete(given("--preset", "tiny"), "CPU", 4)[0]
    assert (options.grad_accum, options.batch_size) == (4, 8)
    assert options.recorded()["reduce_dtype"] == "float32"
    assert not {"zero", "reduce_dtype", "timeout", "gpus"} & completed("--preset", "tiny").recorded().keys()


@pytest.mark.parametrize(("ranks", "grad_accum"), [(1, 16), (4, 16), (8, 16)])
def test_gpt2_as_llm_c_trains_it(ranks: int, grad_accum: int, narrow: dict[str, GPT2Config]) -> None:
    """0.5M tokens an update on any number of ranks, 9.9B in all."""
    found = complete(given("--recipe", "gpt2-124m-10b", "--data", "stories"), "CPU", ranks)[0]
    expected = {"preset": "gpt2", "init": "random", "steps": 18865, "lr": 6e-4, "min_lr": 0.0, "warmup": 700}
    expected |= {"weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "grad_accum": grad_accum, "seq_len": 1024}
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.grad_accum * found.batch_size * found.seq_len == 524_288
    assert found.recipe is None
    assert "recipe" not in found.recorded()
    assert given("--recipe", "gpt2-124m-10b")["data"] == "fineweb10B"
    assert (found.eval_tasks, found.eval_limit, found.eval_tasks_every) == ("hellaswag", 0, 0)  # all of it, at the ends


def test_a_recipe_is_changed_by_other_options() -> None:
    changed = given("--recipe", "gpt2-124m-10b", "--lr", 1e-3, "--grad-accum", 8, "--steps", 50)
    assert (changed["lr"], changed["grad_accum"], changed["steps"], changed["warmup"]) == (1e-3, 8, 50, 700)
    assert "global_batch_tokens" not in changed
    without = given("--recipe", "gpt2-124m-10b", "--eval-tasks", "none", "--eval-limit", 5)
    assert not [name for name in without if name.startswith("eval_") and name not in ("eval_every", "eval_tokens")]
    for other in ("resume", "config"):
        with pytest.raises(InputError, match=f"--recipe and --{other} exclude each other"):
            given("--recipe", "gpt2-124m-10b", f"--{other}", "run")


def test_all_conflicts_are_told_at_once(narrow: dict[str, GPT2Config]) -> None:
    recipe = ("--recipe", "gpt2-124m-10b")
    with pytest.raises(InputError) as raised:
        given(*recipe, "--resume", "run", "--config", "run", "--lr", 1, "--seed", 2)
    assert str(raised.value) == (
        "--recipe, --resume and --config exclude each other; leave two of them out. Also, --resume takes these from "
        "the run, so it goes without --lr and --seed; leave them out"
    )
    with pytest.raises(InputError) as raised:
        given("--rewarm", "--grad-accum", 2, "--global-batch-tokens", 64, "--resume-if-any", "--find-lr", "--lr", 1)
    begins = [said.partition(" ")[0] for said in str(raised.value).split(". Also, ")]
    assert begins == ["--rewarm", "--global-batch-tokens", "--resume-if-any", "--find-lr"]
    with pytest.raises(InputError, match=r"^--rewarm goes with --resume RUN --steps N; give both, or leave it out$"):
        given("--resume", "run", "--rewarm")
    with pytest.raises(InputError, match=r"--rewarm goes .* Also, --eval-limit goes with --eval-tasks"):
        given("--rewarm", "--eval-limit", 2)
    with pytest.raises(InputError) as raised:
        completed(*recipe, "--data", "stories", "--min-lr", 1, "--seq-len", 1025, "--schedule", "5-9")
    begins = [said.partition(" ")[0] for said in str(raised.value).split(". Also, ")]
    assert begins == ["--min-lr", "--seq-len", "--schedule", "--global-batch-tokens"]


def test_what_does_not_go_with_the_global_batch_and_with_going_on() -> None:
    for words, said in [
        (("--global-batch-tokens", 64, "--grad-accum", 2), "--global-batch-tokens works out --grad-accum"),
        (("--resume-if-any",), "--resume-if-any goes with --out RUN"),
        (("--resume-if-any", "--out", "run", "--find-lr"), "--resume-if-any goes with --out RUN"),
    ]:
        with pytest.raises(InputError, match=said):
            given(*words)


def test_the_same_command_goes_on(stub: Stub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where nothing is there, and continued as it is; another option than it has is refused."""
    more: dict[str, object] = {"resume_if_any": True, "grad_accum": None, "global_batch_tokens": 48}
    assert training(stub, place, tmp_path / "run", **more).code == 0
    again = training(stub, place, tmp_path / "run", **more)
    assert (again.code, again.out) == (0, f"{tmp_path}/run is finished, with all its 13 steps\n")
    words = "has --lr 0.02 (not 0.03), and --resume-if-any goes on with it as it is; give what it has, or give another"
    refused(training(stub, place, tmp_path / "run", lr=0.03, **more), words)
    other = training(stub, place, tmp_path / "run", **more | {"global_batch_tokens": 72})
    refused(other, "has --global-batch-tokens 48 (not 72), and --resume-if-any")
    other = training(stub, place, tmp_path / "run", valid=0.2, lr=0.03, warmup=1, **more)
    refused(other, "has no --valid (not 0.2), --lr 0.02 (not 0.03) and --warmup 2 (not 1), and --resume-if-any")


def test_the_same_command_with_the_options_of_another_run(stub: Stub, place: Path, tmp_path: Path) -> None:
    """A run that has them goes on; another says in what its own differ, unless that was given."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, weight_decay in ((run, 0.2), (other, 0.3)):
        assert training(stub, place, folder, weight_decay=weight_decay, steps=1).code == 0
    words = ["--out", run, "--resume-if-any", "--config"]
    assert call(stub.main, *words, run, cwd=place).out == f"{run} is finished, with all its 1 step\n"
    said = f"{run} differs from --config {other}: it has --weight-decay 0.2 (not 0.3), and --resume-if-any goes on"
    refused(call(stub.main, *words, other, cwd=place), said, "leave --config out, or give another --out")
    assert call(stub.main, *words, other, "--weight-decay", 0.2, cwd=place).code == 0


def test_the_same_command_with_more_steps_says_how_to_train_longer(stub: Stub, place: Path, tmp_path: Path) -> None:
    """And what it says is so: the command, and then the same one with these steps."""
    run = tmp_path / "run"
    assert training(stub, place, run, resume_if_any=True).code == 0
    longer = training(stub, place, run, steps=15, resume_if_any=True)
    refused(longer, f"train it longer with `python -m torch_ref.train --resume {run} --steps 15`, and give --steps 15")
    assert call(stub.main, "--resume", run, "--steps", 15, cwd=place).code == 0
    again = training(stub, place, run, steps=15, resume_if_any=True)
    assert (again.code, again.out) == (0, f"{run} is finished, with all its 15 steps\n")
    fewer = training(stub, place, run, resume_if_any=True)
    refused(fewer, "has --steps 15 (not 13), and --resume-if-any goes on with it as it is; give what it has, or")
    both = training(stub, place, run, steps=16, lr=0.03, resume_if_any=True)
    refused(both, "has --steps 15 (not 16) and --lr 0.02 (not 0.03), ", "; give what it has, train it longer with `")


def test_a_repeated_run_keeps_its_global_batch(stub: Stub, place: Path, tmp_path: Path) -> None:
    """On another number of ranks too; unless it is given."""
    trained(stub, place, tmp_path / "run", steps=1)
    again = complete(given("--config", tmp_path / "run") | {"init": str(place / "init")}, "CPU", 3)[0]
    assert (again.grad_accum, again.batch_size) == (2, 3)
    other = given("--config", tmp_path / "run", "--global-batch-tokens", 72)
    assert "grad_accum" not in other


def test_a_rank_that_cannot_read_the_run_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        InputError, match=r"rank 3 on \S+ finds no run in .*: put it on a disk that they share, or copy"
    ):
        given("--resume", tmp_path)


def test_a_limit_is_of_tasks(tmp_path: Path) -> None:
    assert given("--eval-tasks", "stories", "--eval-limit", 1)["eval_limit"] == 1
    with pytest.raises(InputError, match="--eval-limit goes with --eval-tasks"):
        given("--eval-limit", 1)
    write_sealed(
        tmp_path / "run.json", {"options": completed("--eval-tasks", "piqa", "--eval-data-file", "a").recorded()}
    )
    run = ("--config", tmp_path)
    assert given(*run)["eval_data_file"] == "a"
    assert "eval_data_file" not in given(*run, "--eval-tasks", "stories")
    assert "eval_tasks" not in given(*run, "--eval-tasks", "none")
    write_sealed(tmp_path / "run.json", {"options": completed().recorded()})
    with pytest.raises(InputError, match=r"^--eval-limit and --eval-tasks-every go with --eval-tasks "):
        given(*run, "--eval-limit", 1, "--eval-tasks-every", 2)
    with pytest.raises(InputError, match="--eval-tasks-every goes with --eval-tasks"):
        given("--eval-tasks-every", 0)
    with pytest.raises(InputError, match="--eval-data-file goes with --eval-tasks"):
        given("--eval-data-file", "own.jsonl")
