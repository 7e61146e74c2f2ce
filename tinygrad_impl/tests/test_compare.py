"""The comparison of models."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tinygrad import dtypes

import data.runs.comparison
import torch_ref.model
from data.checkpoints.checkpoint import load, save
from data.checkpoints.config import GPT2Config
from data.runs.report_comparison import comparison_page
from data.runs.run_folder import read_sealed, write_sealed
from data.testing import Result, call, refused, save_model, write_tokens
from data.text.copied import training_words
from data.text.counts import spoken, words
from data.text.loader import Loader
from data.text.sampling import Sampler
from data.text.shards import open_split
from data.text.stories import stories
from data.text.tokenizer import gpt2, tokenizer
from tinygrad_impl import compare
from tinygrad_impl.backend import Plain
from tinygrad_impl.compare import main
from tinygrad_impl.tests.support import by_torch, save_sure_model

PAIR = ["Once upon a time", "The dog"]
MEASURED, SEQ_LEN = 150, 24  # neither whole windows nor a whole batch of four
SMALLEST = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sides = {"pretrained": 1, "finetuned": 3}
    return {side: save_sure_model(tmp_path_factory.mktemp(side), seed) for side, seed in sides.items()}


@pytest.fixture(scope="module")
def compared(
    models: dict[str, Path], prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """The folder that a comparison was made in, and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    options = ["--data", prepared_folder, "--eval-tokens", MEASURED, "--seq-len", SEQ_LEN, "--html", "page.html"]
    options += ["--temperature", 1.7, "--top-k", 40, "--top-p", 0.9, "--seed", 6, "--max-new-tokens", 12]
    options += models.values()
    options += [word for prompt in PAIR for word in ("--prompt", prompt)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "revision", lambda: {"commit": "ab" * 20, "clean": False})
        result = call(main, *options, "--device", "CPU", cwd=folder)
    assert result.code == 0, result
    return folder, result


@torch.no_grad()
def reference_loss(model_folder: Path, prepared: Path) -> float:
    """The mean over the first tokens of the validation split, by PyTorch, of windows that begin anew."""
    config, arrays = load(model_folder)
    model = torch_ref.model.GPT2(config, {name: array.astype(np.float64) for name, array in arrays.items()})
    row = Loader(prepared, "valid", 1, 199, 0).next_batch()[0][0]  # all but the last
    losses: list[float] = []
    for start in range(0, MEASURED, SEQ_LEN):
        stop = min(start + SEQ_LEN, MEASURED)
        x, y = torch.tensor(row[start:stop])[None], torch.tensor(row[start + 1 : stop + 1]).long()
        losses += torch.nn.functional.cross_entropy(model(x)[0][0], y, reduction="none").tolist()
    assert len(losses) == MEASURED
    return sum(losses) / MEASURED


def quoted(text: str) -> str:
    return "> " + text.strip().replace("\n", "\n> ")


def test_what_it_says(compared: tuple[Path, Result], models: dict[str, Path], prepared_folder: Path) -> None:
    """Every figure is PyTorch's, and every text that of its logits, drawn with the same random numbers."""
    losses = {side: reference_loss(path, prepared_folder) for side, path in models.items()}
    assert abs(losses["pretrained"] - losses["finetuned"]) > 1e-2
    sampler = {side: Sampler(1.7, 40, 0.9, 6) for side in models}
    texts = {side: by_torch(path, PAIR, 12, sampler[side]) for side, path in models.items()}
    assert len({*texts["pretrained"], *texts["finetuned"]}) == 4
    page, _, last = compared[1].out.rpartition("\n\n")
    assert last == "Written to compare.md, compare.json and page.html\n"
    table, counted = page.split("\n\n")[2], page.split("\n\n")[3:6]
    assert counted[0] == "Of 2 texts of each model, mean ± standard deviation:"
    heads = "words | distinct words | repeated 4-grams | reached end of text | bits per byte of its own text"
    assert counted[1].startswith(f"| | {heads} |\n|---|")
    assert "copied" not in page  # nothing says what these were trained on
    printed = re.findall(r"(?m)^\| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", table)
    assert "\n| | loss (nats a token) | perplexity | tokens | bits per byte |\n|---|---|---|---|---|\n| /" in page
    size = len(tokenizer().decode(np.concatenate(open_split(prepared_folder, "valid"))[1:151].tolist()).encode())
    for (label, loss, perplexity, tokens, bits), (side, path) in zip(printed, models.items(), strict=True):
        assert label == str(path)
        assert re.fullmatch(r"\d+\.\d{4}/\d+\.\d\d", f"{loss}/{perplexity}")
        assert float(loss) == pytest.approx(losses[side], abs=2e-4)
        assert tokens == "150"
        assert float(bits) == pytest.approx(losses[side] * 150 / math.log(2) / size, rel=1e-3)
        assert float(perplexity) == pytest.approx(math.exp(losses[side]), rel=1e-3)
    lines = [
        f"# {models['pretrained']} and {models['finetuned']}",
        f"On {prepared_folder}, the first 150 of 199 validation tokens, 24 at a time:",
        table,
        *counted,
    ]
    for i, prompt in enumerate(PAIR):
        lines += [f"## {prompt}"]
        for side in models:
            lines += [f"**{models[side]}**", quoted(texts[side][i])]
    lines += ["The same for all: temperature 1.7, top-k 40, top-p 0.9, seed 6, max-new-tokens 12, num-samples 1."]
    assert page == "\n\n".join(lines)


def test_what_is_written(compared: tuple[Path, Result], models: dict[str, Path], prepared_folder: Path) -> None:
    """The page as it was printed, and of the JSON what is on the page, with every piece's probability."""
    folder, result = compared
    assert (
        result.out
        == f"{(folder / 'compare.md').read_text(encoding='utf-8')}\nWritten to compare.md, compare.json and page.html\n"
    )
    found = read_sealed(folder / "compare.json")
    expected = {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "seed": 6, "max_new_tokens": 12, "num_samples": 1}
    assert {name: found[name] for name in ("data", "tokens", "seq_len", "sampling", "source")} == {
        **{"data": str(prepared_folder), "tokens": 150, "seq_len": 24, "sampling": expected},
        "source": {"commit": "ab" * 20, "clean": False},
    }
    assert found.keys() == {
        *("models", "data", "tokens", "valid_tokens", "bytes", "seq_len", "training_text"),
        *("sampling", "source", "texts"),
    }
    assert [text["prompt"] for text in found["texts"]] == PAIR
    for i, path in enumerate(models.values()):
        model = found["models"][i]
        assert model["name"] == str(path)
        assert model["perplexity"] == math.exp(model["loss"])
        assert model["vocab_size"] == json.loads((path / "config.json").read_text())["vocab_size"]
        assert f"| {path} | {model['loss']:.4f} | {model['perplexity']:.2f} | 150 | " in result.out
        for text in found["texts"]:
            [sample] = text["models"][i]["samples"]
            assert quoted(text["prompt"] + "".join(sample["pieces"])) in result.out
            assert len(sample["pieces"]) == len(sample["probabilities"]) > 2
            assert all(0 < p < 1 for p in sample["probabilities"])
            written = "".join(sample["pieces"])
            assert sample["bits_per_byte"] == pytest.approx(
                -sum(map(math.log2, sample["probabilities"])) / len(written.encode())
            )
            assert sample["words"] == len(words(written))
        both = [text["models"][i]["samples"][0]["words"] for text in found["texts"]]
        assert model["measures"][0] == {
            **{"name": "words", "mean": sum(both) / 2, "texts": 2},
            "spread": pytest.approx(abs(both[0] - both[1]) / math.sqrt(2)),
        }
        assert f"\n| {path} | {spoken(model['measures'][0])} | " in result.out
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page == comparison_page(found)


def test_progress(compared: tuple[Path, Result], models: dict[str, Path]) -> None:
    """What computes each model, how many batches of four windows, and how many tokens."""
    err = compared[1].err
    for path in models.values():
        assert re.search(rf"(?m)^{path}, 0\.8M parameters; CPU with \d+ cores, float32, plain kernels$", err)
    for line in (r"loss: 100%.* 2/2 ", r"texts: 100%.* 12/12 "):
        assert len(re.findall(f"(?m)^{line}", err)) >= 2  # once more where it took long
    assert not compared[1].errors


class Watched:
    """What the program gave to what computes: in `made` the dtypes, in `read` the batches, in `asked` the rest."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.read: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.asked: list[tuple[Any, ...]] = []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """No models: what is tested is around them. The first model's loss is 2, the second's 1."""
    watched = Watched()

    class Evaluator:
        def __init__(self, *arguments: Any):
            watched.made.append(arguments)

        def __call__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
            watched.read.append(list(batches))
            return 3.0 - len(watched.read)

        def of_tokens(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.where(y < 0, 0, np.float32(math.log(4))), y < 0

    class Generator:
        def __init__(self, *arguments: Any):
            watched.made.append(arguments)

        def stream(self, prompts: list[list[int]], new: int, sampler: Sampler) -> Iterator[list[Any]]:
            watched.asked.append((prompts, new, sampler))
            yield [(257, 0.5), None][: len(prompts)] + [None] * (len(prompts) - 2)

    monkeypatch.setattr(compare, "Evaluator", Evaluator)
    monkeypatch.setattr(compare, "Generator", Generator)
    monkeypatch.setattr(data.runs.comparison, "training_words", lambda folder, tick: iter(()))  # which takes a while
    return watched


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("smallest"), SMALLEST)


def a_run(folder: Path, prepared: Path) -> Path:
    for step in (3, 20, 100):
        save_model(folder / "checkpoints" / f"step-{step}", SMALLEST, seed=step)
    (folder / "checkpoints" / "latest").write_text("step-20\n")
    write_sealed(folder / "run.json", {"data": {"folder": str(prepared)}, "options": {"seq_len": 16}})
    return folder


def test_a_run_names_its_data_and_keeps_the_page(
    quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """And all that is not asked for is as the help says."""
    run = a_run(tmp_path / "run", prepared_folder)
    result = call(main, smallest, run, "--device", "CPU", cwd=tmp_path)
    assert result.code == 0, result
    page = (run / "compare.md").read_text(encoding="utf-8")
    assert f"# {smallest} and {run}\n" in page
    assert f"On {prepared_folder}, the first 199 of 199" in page
    assert "16 at a time" in page  # as the run was trained
    prompts = ["Once upon a time", "One day, a little girl named Lily", "The dog was sad because"]
    assert re.findall(r"(?m)^## (.*)$", page) == prompts
    assert f"| {smallest} | 2.0000 | 7.39 | 199 |" in page
    assert f"| {run} | 1.0000 | 2.72 | 199 |" in page
    assert "The same for all: temperature 0.6, top-k 40, seed 1337, max-new-tokens 160, num-samples 1." in page
    assert not (tmp_path / "compare.md").exists()
    found = read_sealed(run / "compare.json")
    assert (found["seq_len"], found["tokens"]) == (16, 199)
    first, second, _ = (text["models"][0]["samples"] for text in found["texts"])
    of_loss = [pytest.approx(0.25)]
    assert (first[0]["pieces"], first[0]["probabilities"], first[0]["ended"]) == ([" a"], of_loss, True)
    assert (second[0]["pieces"], second[0]["probabilities"], second[0]["words"]) == ([], [], 0)
    assert found["training_text"] == str(prepared_folder)
    assert first[0]["longest_copied"] == 0
    for batches in quick.read:
        assert {x.shape for x, _ in batches} == {(4, 16)}
        assert sum(int((y >= 0).sum()) for _, y in batches) == 199
    weights = [arguments[0].wte.weight.numpy() for arguments in quick.made]
    step_20 = load(run / "checkpoints" / "step-20")[1]["wte.weight"]
    for found_there, expected in zip(weights, [load(smallest)[1]["wte.weight"]] * 2 + [step_20] * 2, strict=True):
        np.testing.assert_array_equal(found_there, expected)
    names = (str(smallest), str(run))
    made = [of for name in names for of in ((Plain(),), (Plain(), 50257, 50256, name))]
    assert [arguments[1:] for arguments in quick.made] == made
    samplers = [sampler for _, _, sampler in quick.asked]
    assert [(s.temperature, s.top_k, s.top_p) for s in samplers] == [(0.6, 40, None)] * 2
    first = np.random.Generator(np.random.PCG64(1337)).random()
    assert [sampler.random.random() for sampler in samplers] == [first] * 2  # each from the beginning


class Writer:
    """Writes, of each row, whatever `rows` says, and then ends the text."""

    rows: ClassVar[list[str]]

    def __init__(self, *_: Any):
        pass

    def stream(self, prompts: list[list[int]], new: int, _: Sampler) -> Iterator[list[Any]]:
        assert len(prompts) == len(self.rows)
        tokens = [tokenizer().encode_ordinary(row)[:new] for row in self.rows]
        for i in range(max(map(len, tokens))):
            yield [(row[i], 0.5) if i < len(row) else None for row in tokens]


def test_many_samples_of_three_models(
    quick: Watched, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is counted by itself, in the order of prompts and samples; and what it has of the training text."""
    texts = list(islice(stories(5), 3))
    write_tokens(tmp_path / "data", gpt2().encode_documents(texts[:2]), np.arange(50))
    write_tokens(tmp_path / "valid", np.arange(50), np.arange(50))
    copied = " ".join(texts[1].split()[3:13])
    Writer.rows = [" one two", " one one one one one one", " a b c d e", " " + copied + " pineapple", "", " two three"]
    monkeypatch.setattr(compare, "Generator", Writer)
    monkeypatch.setattr(data.runs.comparison, "training_words", training_words)
    given = (smallest, smallest, smallest, "--device", "CPU", "--data", "valid")
    options = ("--prompt", "A", "--prompt", "B", "--num-samples", 3, "--max-new-tokens", 6, "--html", "page.html")
    assert call(main, *given, *options, "--out", "short.md", cwd=tmp_path).code == 0
    short = read_sealed(tmp_path / "short.json")["texts"]
    assert [one["ended"] for text in short for one in text["models"][2]["samples"]] == [
        *(True, False, True),
        *(False, True, True),
    ]
    result = call(main, *given, *options, "--max-new-tokens", 99, "--trained-on", "data", cwd=tmp_path)
    assert result.code == 0, result
    found = read_sealed(tmp_path / "compare.json")
    assert (found["training_text"], found["data"]) == ("data", "valid")
    for i in range(3):
        samples = [one for text in found["texts"] for one in text["models"][i]["samples"]]
        assert ["".join(one["pieces"]) for one in samples] == Writer.rows
        size = len(words(copied))
        assert [one["words"] for one in samples] == [2, 6, 5, size + 1, 0, 2]
        assert [one["repeated_4grams"] for one in samples] == [None, pytest.approx(2 / 3), 0, 0, None, None]
        assert [one["longest_copied"] for one in samples] == [0, 0, 0, size, 0, 0]
        shares = [None, None, None, (size - 7) / (size - 6), None, None]
        assert [one["copied_8grams"] for one in samples] == [share and pytest.approx(share) for share in shares]
        of_a, of_b = (text["models"][i]["measures"] for text in found["texts"])
        assert of_a[0] == {"name": "words", "mean": 13 / 3, "spread": statistics.stdev([2, 6, 5]), "texts": 3}
        assert of_b[0]["mean"] == (size + 3) / 3
        assert found["models"][i]["measures"][0]["spread"] == statistics.stdev([2, 6, 5, size + 1, 0, 2])
    assert result.out.startswith(f"# {smallest}, {smallest} and {smallest}\n")
    assert "Of 6 texts of each model, mean ± standard deviation:" in result.out
    assert "Copied: verbatim overlap with the training text of data: the longest run" in result.out
    assert result.out.count(f"\n| {smallest} | 4.3 ± 2.1 | ") == 3
    assert result.out.count("\n> A a b c d e\n") == 3
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>Three models</h1>" in page
    assert page.count('<div class="sides" style="--n:3">') == 6
    assert page.count(">4.3 ± 2.1</td>") == 3


def test_samples_follow_their_prompts(quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path) -> None:
    given = (smallest, "--data", prepared_folder, "--device", "CPU", "--prompt", "A", "--prompt", "B")
    assert call(main, *given, "--num-samples", 2, cwd=tmp_path).code == 0
    [(prompts, *_)] = quick.asked
    assert [tokenizer().decode(prompt) for prompt in prompts] == ["A", "A", "B", "B"]


def test_a_training_text_that_is_gone(quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", tmp_path / "gone")
    result = call(main, smallest, run, "--device", "CPU", "--data", prepared_folder, cwd=tmp_path)
    assert result.code == 0, result
    assert "note: copied words are not counted (there is no folder" in result.err
    assert read_sealed(run / "compare.json")["training_text"] is None


def test_the_defaults_are_those_of_the_run(
    quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """How its samples were written; and what is random is called so."""
    run = a_run(tmp_path / "run", prepared_folder)
    sampling = {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "seed": 5, "max_new_tokens": 6}
    write_sealed(run / "run.json", read_sealed(run / "run.json") | {"sampling": sampling})
    for step, init in ((0, "random"), (3, "random"), (0, "gpt2")):
        state = {"step": step, "options": {"init": init}}
        (run / "checkpoints" / "step-3" / "trainer.json").write_text(json.dumps(state))
        run_or_checkpoint = "run" if step else "run/checkpoints/latest"  # either has the data and settings of the run
        given: tuple[Any, ...] = ("run/checkpoints/step-3", run_or_checkpoint)
        given += ("--device", "CPU", "--top-k", 0)
        result = call(main, *given, cwd=tmp_path)
        name = "run/checkpoints/step-3" + " (random weights)" * (step == 0 and init == "random")
        assert result.out.startswith(f"# {name} and {run_or_checkpoint}\n")
        assert f"On {prepared_folder}, " in result.out
        assert f"\n**{name}**\n" in result.out
        assert "temperature 0.3, top-p 0.8, seed 5, max-new-tokens 6" in result.out
        assert result.out.endswith("\nWritten to run/compare.md and run/compare.json\n")
        found = read_sealed(run / "compare.json")
        assert (found["sampling"], found["models"][0]["name"]) == (sampling | {"top_k": None, "num_samples": 1}, name)


def test_losses_are_measured_within_what_was_trained(
    quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """Unless other windows are asked for."""
    config, arrays = load(smallest)
    save(tmp_path / "short", replace(config, trained_positions=9), arrays)
    given = (smallest, "short", "--device", "CPU", "--data", prepared_folder)
    assert "9 at a time" in call(main, *given, cwd=tmp_path).out
    assert "32 at a time" in call(main, *given, "--seq-len", 32, cwd=tmp_path).out


def test_of_a_long_text_the_beginning(quick: Watched, smallest: Path, tmp_path: Path) -> None:
    valid = np.arange(17_000) % 50_000
    folder = write_tokens(tmp_path / "long", valid[:100], valid)
    given = (smallest, smallest, "--data", folder, "--device", "CPU", "--seq-len", 4)
    for options, tokens in (((), 16_384), (("--eval-tokens", 0), 16_999), (("--eval-tokens", 20_000), 16_999)):
        result = call(main, *given, *options, cwd=tmp_path)
        assert f"the first {tokens:,} of 16,999 validation tokens, 4 at a time" in result.out
        targets = np.concatenate([y.flat for _, y in quick.read.pop()])
        np.testing.assert_array_equal(targets[targets >= 0], valid[1 : tokens + 1])


def test_the_context_is_what_both_models_have(quick: Watched, smallest: Path, prepared_folder: Path) -> None:
    short = save_model(prepared_folder.parent / "short", GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=20))
    for pair in ((smallest, short), (short, smallest)):
        given = (pair[0], pair[1], "--data", prepared_folder, "--device", "CPU")
        assert "20 at a time" in call(main, *given, cwd=prepared_folder).out
        assert "20 at a time" in call(main, *given, "--seq-len", 20, cwd=prepared_folder).out
        refused(call(main, *given, "--seq-len", 21, cwd=prepared_folder), "over the context of 20 tokens that all")


def test_device_dtype_and_stories(
    quick: Watched, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 is for both, losses and texts; without --data and a run the text is that of our stories."""
    asked: list[Any] = []
    folder = write_tokens(tmp_path / "data", np.arange(100), np.arange(50))

    def answered(answer: object) -> Callable[..., object]:
        return lambda question, *_, **__: (asked.append(question), answer)[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(compare, "open_device", answered("CPU"))
    monkeypatch.setattr(compare, "prepared", answered(folder))
    given = (smallest, smallest, "--device", "metal", "--dtype", "bfloat16")
    result = call(main, *given, cwd=tmp_path)
    assert asked == ["metal", "stories"]
    assert [arguments[1:] for arguments in quick.made] == [
        (Plain(dtypes.bfloat16),),
        (Plain(dtypes.bfloat16), 50257, 50256, str(smallest)),
    ] * 2
    assert len(re.findall(r"(?m)^/.*, bfloat16, plain kernels$", result.err)) == 2


@pytest.mark.parametrize(("loss", "shown"), [(699.0, f"{math.exp(699):.2f}"), (701.0, "∞"), (1e300, "∞")])
def test_a_perplexity_beyond_float64(
    loss: float, shown: str, quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compare, "Evaluator", lambda *_: Losing(loss))
    given = (smallest, "--data", prepared_folder, "--device", "CPU", "--html", "page.html")
    assert f"| {loss:.4f} | {shown} |" in call(main, *given, cwd=tmp_path).out
    json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert (">∞<" in (tmp_path / "page.html").read_text(encoding="utf-8")) == (shown == "∞")


class Losing:
    """An evaluator that always finds this loss."""

    def __init__(self, loss: float):
        self.loss = loss

    def __call__(self, batches: Iterable[Any]) -> float:
        return len(list(batches)) and self.loss

    def of_tokens(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(x.shape, np.float32), y < 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_that_gives_no_number_is_named(
    loss: float, quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compare, "Evaluator", lambda *_: Losing(loss))
    result = call(main, smallest, "--data", prepared_folder, "--device", "CPU", cwd=tmp_path)
    assert result.code == 2
    assert result.errors[0].startswith(f"error: what {smallest} computes is not a number")
    assert not (tmp_path / "compare.json").exists()


def test_how_a_text_is_read(quick: Watched, smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "valid.jsonl").write_bytes(b'{"body": "held out \xff"}\n')
    given = (smallest, smallest, "--device", "CPU")
    options = ("--data", "a.jsonl", "--valid", "valid.jsonl", "--field", "body", "--errors", "replace")
    assert call(main, *given, *options, cwd=tmp_path).code == 0
    tokens = np.concatenate(open_split(tmp_path / read_sealed(tmp_path / "compare.json")["data"], "valid"))
    assert tokenizer().decode(tokens.tolist()) == "held out \ufffd<|endoftext|>"
    for alone in (options[2:4], options[4:6], options[6:]):
        refused(call(main, *given, *alone, cwd=tmp_path), "say how to read the text of --data; give that too")


def test_out(quick: Watched, smallest: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", prepared_folder)
    given = (smallest, run, "--device", "CPU")
    options = ("--out", "page.md", "--html", "page.html", "--prompt", "a\nb <b>", "--data", prepared_folder)
    assert call(main, *given, *options, cwd=tmp_path).code == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "> a\n> b <b> a\n" in page  # every line is part of the quotation
    assert not (run / "compare.md").exists()
    assert read_sealed(tmp_path / "page.json")["texts"][0]["prompt"] == "a\nb <b>"
    assert "b &lt;b&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--eval-tokens", -1], "--eval-tokens"),
        (["--seq-len", 33], "--seq-len 33 is over the context of 32 tokens"),
        (["--top-p", 2], "--top-p: 2 is not a number above 0 and at most 1"),
        (["--temperature", "hot"], "--temperature"),
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--out", "nowhere/page.md"], "there is no folder nowhere"),
        (["--out", "page.json"], "--out page.json names the Markdown file"),
        (["--out", "."], "--out . is a folder; name a file to write"),
        (["--html", "."], "--html . is a folder; name a file to write"),
        (["--html", "nowhere/page.html"], "there is no folder nowhere to write page.html into; name another --html"),
        (["--data", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--data", "."], "holds no file in a format that can be read"),
        (["--data", ""], "an empty name is no source"),
        (["--field", "body"], "is prepared already, so it goes without --valid, --field and --errors"),
        (["--device", "CPU", "--trained-on", "nowhere"], "'nowhere' is not a source of text"),
        (["--trained-on", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--num-samples", 0], "--num-samples"),
        (["--device", "abacus"], "there is no device 'abacus'"),
    ],
)
def test_bad_input(options: list[object], word: str, smallest: Path, prepared_folder: Path, tmp_path: Path) -> None:
    given = [smallest, smallest, "--data", prepared_folder]
    refused(call(main, *given, *options, cwd=tmp_path), word)
    assert not (tmp_path / "compare.md").exists()


def test_models_have_to_be_named(smallest: Path, tmp_path: Path) -> None:
    refused(call(main, smallest, "./nowhere", cwd=tmp_path), "there is no folder ./nowhere")
    refused(call(main, cwd=tmp_path), "name models: `python -m tinygrad_impl.compare gpt2 runs/mine`")
    older = call(main, "--pretrained", "gpt2", "--finetuned", "a b", cwd=tmp_path)
    refused(older, "without --pretrained and --finetuned: `python -m tinygrad_impl.compare gpt2 'a b'`")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"data": {}}', '{"data": 3}', '{"data": {"folder": "data"}}'])
def test_a_damaged_run_json(text: str, smallest: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", prepared_folder)
    try:
        write_sealed(run / "run.json", json.loads(text))  # of another version, say
    except (ValueError, TypeError):
        (run / "run.json").write_text(text)
    refused(call(main, smallest, run, "--device", "CPU", cwd=tmp_path), "run.json")
