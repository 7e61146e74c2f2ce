"""The comparison of two models."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.checkpoint import load
from data.loader import windows
from data.run_folder import read_sealed, write_sealed
from data.sampling import Sampler
from data.shards import read_meta
from data.testing import SMALL, Result, call, refused, save_model
from tinygrad_impl import compare
from tinygrad_impl.compare import PROMPTS, main
from tinygrad_impl.generate import Generator, write
from tinygrad_impl.report import comparison_page
from torch_ref.model import GPT2

PAIR = ["Once upon a time", "The dog"]
MEASURED = 150


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="module")
def compared(
    small: Path, other: Path, prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """The folder that a comparison was made in, and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    prompts = [word for prompt in PAIR for word in ("--prompt", prompt)]
    options = ["--data", prepared_folder, "--eval-tokens", MEASURED, "--max-new-tokens", 6, "--device", "CPU", *prompts]
    result = call(main, "--pretrained", small, "--finetuned", other, *options, cwd=folder)
    assert result.code == 0, result
    return folder, result


def reference_loss(model_folder: Path, data: Path) -> float:
    """The mean loss a token, by PyTorch."""
    model = GPT2(*load(model_folder))
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in windows(data, "valid", 1, SMALL.n_positions, MEASURED):
            loss = model(torch.tensor(x), torch.tensor(y))[1].item()
            total += loss * int((y >= 0).sum())
            count += int((y >= 0).sum())
    assert count == MEASURED
    return total / count


def test_losses_and_perplexities(
    compared: tuple[Path, Result], small: Path, other: Path, prepared_folder: Path
) -> None:
    printed = re.findall(r"(?m)^\| (pretrained|finetuned): (\S+) \| (\S+) \| (\S+) \|$", compared[1].out)
    assert [(side, name) for side, name, _, _ in printed] == [("pretrained", str(small)), ("finetuned", str(other))]
    expected = [reference_loss(folder, prepared_folder) for folder in (small, other)]
    assert abs(expected[0] - expected[1]) > 1e-3  # so that exchanging them would show
    for (_, _, loss, perplexity), reference in zip(printed, expected, strict=True):
        assert float(loss) == pytest.approx(reference, abs=1e-4)
        assert float(perplexity) == pytest.approx(math.exp(reference), rel=1e-3)
    assert f"the first {MEASURED} of {read_meta(prepared_folder)['splits']['valid']['tokens'] - 1}" in compared[1].out


def test_texts(compared: tuple[Path, Result]) -> None:
    out = compared[1].out
    assert re.findall(r"(?m)^## (.*)$", out) == PAIR
    texts = re.findall(r"(?ms)^\*\*(pretrained|finetuned)\*\*\n\n> (.*?)\n(?!>)", out)
    assert [side for side, _ in texts] == ["pretrained", "finetuned"] * 2
    for i, prompt in enumerate(PAIR):
        before, after = texts[2 * i][1], texts[2 * i + 1][1]
        assert before.startswith(prompt)
        assert after.startswith(prompt)
        assert len(before) > len(prompt)
        assert before != after


def test_the_page_is_written_here_by_default(compared: tuple[Path, Result]) -> None:
    folder, result = compared
    page = (folder / "compare.md").read_text(encoding="utf-8")
    assert result.out == f"{page}\nWritten to compare.md\n"
    assert not result.errors


def test_json(compared: tuple[Path, Result], small: Path, other: Path, prepared_folder: Path) -> None:
    """What the page says, and every piece of the texts with its probability."""
    folder, result = compared
    found = read_sealed(folder / "compare.json")
    assert found.keys() == {"pretrained", "finetuned", "data", "tokens", "seq_len", "sampling", "texts"}
    assert (found["data"], found["tokens"], found["seq_len"]) == (str(prepared_folder), MEASURED, SMALL.n_positions)
    expected = {"temperature": 0.8, "top_k": None, "top_p": None, "seed": 0, "max_new_tokens": 6}
    assert found["sampling"] == expected
    assert [text["prompt"] for text in found["texts"]] == PAIR
    for side, path in (("pretrained", small), ("finetuned", other)):
        assert found[side].keys() == {"name", "loss", "perplexity"}
        assert found[side]["name"] == str(path)
        assert found[side]["perplexity"] == math.exp(found[side]["loss"])
        assert f"| {side}: {path} | {found[side]['loss']:.4f} | {found[side]['perplexity']:.2f} |" in result.out
        written = write(Generator(compare.GPT2(*load(path))), PAIR, 6, Sampler(0.8))
        for text, whole in zip(found["texts"], written, strict=True):
            assert text.keys() == {"prompt", "pretrained", "finetuned"}
            pieces, probabilities = text[side]["pieces"], text[side]["probabilities"]
            assert text["prompt"] + "".join(pieces) == whole
            assert len(pieces) == len(probabilities) > 2
            assert all(0 < p < 1 for p in probabilities)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No models: what is tested is around them."""
    monkeypatch.setattr(compare.Evaluator, "__call__", lambda self, batches: float(sum(1 for _ in batches)))
    monkeypatch.setattr(compare.Generator, "stream", lambda *_: iter(()))


def a_run(folder: Path, data: Path) -> Path:
    save_model(folder / "checkpoints" / "step-3", seed=2)
    (folder / "checkpoints" / "latest").write_text("step-3\n")
    write_sealed(folder / "run.json", {"data": {"folder": str(data)}, "options": {"seq_len": 16}})
    return folder


@pytest.mark.usefixtures("quick")
def test_a_run_names_its_data_and_keeps_the_page(small: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", prepared_folder)
    result = call(main, "--pretrained", small, "--finetuned", run, "--device", "CPU", cwd=tmp_path)
    assert result.code == 0, result
    page = (run / "compare.md").read_text(encoding="utf-8")
    assert f"On {prepared_folder}, the first 199 of 199" in page
    assert "16 at a time" in page  # as the run was trained
    assert re.findall(r"(?m)^## (.*)$", page) == PROMPTS
    assert not (tmp_path / "compare.md").exists()
    assert read_sealed(run / "compare.json")["seq_len"] == 16


@pytest.mark.usefixtures("quick")
def test_html(small: Path, prepared_folder: Path, tmp_path: Path) -> None:
    given = ("--pretrained", small, "--finetuned", small, "--data", prepared_folder, "--device", "CPU")
    assert call(main, *given, "--html", "page.html", "--prompt", "A <b>", cwd=tmp_path).code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == comparison_page(read_sealed(tmp_path / "compare.json"))
    assert "A &lt;b&gt;" in page


@pytest.mark.usefixtures("quick")
def test_out(small: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", prepared_folder)
    options = ("--out", "page.md", "--eval-tokens", 0, "--device", "CPU", "--prompt", "a\nb")
    assert call(main, "--pretrained", small, "--finetuned", run, *options, cwd=tmp_path).code == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "> a\n> b\n" in page  # every line is part of the quotation
    assert "the first 199 of 199" in page
    assert not (run / "compare.md").exists()
    assert read_sealed(tmp_path / "page.json")["texts"][0]["prompt"] == "a\nb"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--eval-tokens", -1], "--eval-tokens"),
        (["--seq-len", 33], "--seq-len 33 is over the context of 32 tokens"),
        (["--top-p", 2], "top-p is 2.0"),
        (["--temperature", "hot"], "--temperature"),
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--out", "nowhere/page.md"], "there is no folder nowhere"),
        (["--out", "page.json"], "--out page.json names the Markdown file"),
        (["--html", "nowhere/page.html"], "there is no folder nowhere to write page.html into; name another --html"),
        (["--data", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--data", "."], "no meta.json"),
        (["--finetuned", "./nowhere"], "there is no folder ./nowhere"),
        (["--device", "abacus"], "there is no device ABACUS"),
    ],
)
def test_bad_input(options: list[object], word: str, small: Path, prepared_folder: Path, tmp_path: Path) -> None:
    given = ["--pretrained", small, "--finetuned", small, "--data", prepared_folder]
    refused(call(main, *given, *options, cwd=tmp_path), word)
    assert not (tmp_path / "compare.md").exists()


def test_both_models_have_to_be_named(small: Path, tmp_path: Path) -> None:
    refused(call(main, "--pretrained", small, cwd=tmp_path), "--finetuned")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"data": {}}', '{"data": 3}', '{"data": {"folder": "data"}}'])
def test_a_damaged_run_json(text: str, small: Path, prepared_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", prepared_folder)
    try:
        write_sealed(run / "run.json", json.loads(text))  # of another version, say
    except (ValueError, TypeError):
        (run / "run.json").write_text(text)
    refused(call(main, "--pretrained", small, "--finetuned", run, "--device", "CPU", cwd=tmp_path), "run.json")


def test_the_mean_counts_every_token_once(small: Path) -> None:
    """A batch that is mostly padding must not weigh as much as a full one."""
    losses = iter([1.0, 4.0])

    class Fixed:
        def __call__(self, x: object, y: object) -> object:
            return type("Loss", (), {"item": lambda self: next(losses)})()

    evaluator = compare.Evaluator(compare.GPT2(*load(small)))
    evaluator._loss = Fixed()
    x, y = np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int32)
    padded = np.array([[0, -100, -100, -100]], np.int32)
    assert evaluator([(x, y), (x, padded)]) == pytest.approx((4 * 1.0 + 1 * 4.0) / 5)
