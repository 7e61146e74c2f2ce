"""Tasks that the harness knows by name, on rows of the hub's form: tinygrad, torch_ref and the harness's own `hf` model
give the same answers and scores.
"""

import importlib.util
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.checkpoints.checkpoint import save
from data.checkpoints.config import GPT2Config
from data.evaluation.command import evaluate, parser
from data.evaluation.scores import score_rows
from data.evaluation.tasks import specs_of
from data.text.stories import stories
from data.text.tokenizer import gpt2
from parity_tests.weights import random_weights
from tinygrad_impl.evaluate import opened as by_tinygrad
from torch_ref.evaluate import opened as by_torch
from torch_ref.model import GPT2

pytestmark = [
    pytest.mark.slow,  # data/evaluation/tests checks the packing, and test_losses of both sides, more quickly
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
        reason="needs lm-eval[hf]: run `make extras`",
    ),
]

CONFIG = GPT2Config(vocab_size=50257, n_positions=288, n_embd=16, n_layer=2, n_head=2)  # they ask for 256 new tokens
WORDS = ["catastrophe", "hors-d'oeuvre", "naïveté", "猫猫", "antidisestablishment", "Menzies"]  # of several tokens each
MARKUP = (
    " = Robert = \n \n He was a guest @-@ star , in 2000 , for 1 @,@ 000 m ( 3 @.@ 2 ft ) . \n"  # as WikiText has it
)


def rows() -> dict[str, list[dict[str, Any]]]:
    """Questions of each task, with the fields that the hub's have. Pages of WikiText are longer than the context."""
    told = list(islice(stories(9), len(WORDS)))
    return {
        "lambada_openai": [
            {"text": f"{story[: 90 + 400 * i * (i % 2)].rpartition(' ')[0]} {word}"}  # every other one is long
            for i, (story, word) in enumerate(zip(told, WORDS, strict=True))
        ],
        "wikitext": [{"page": MARKUP + story.replace(".", " .") * 2 * i} for i, story in enumerate(told[:4])],
        "nq_open": [{"question": story[:60], "answer": ["yes", "no"]} for story in told],
        "gsm8k": [{"question": story[:40], "answer": f"1 + {i} #### {i + 1}"} for i, story in enumerate(told)],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned the last words of half of LAMBADA's rows, so that greedy decoding gives these."""
    path = tmp_path_factory.mktemp("hub") / "model"
    net = GPT2(CONFIG, {name: array.astype(np.float32) for name, array in random_weights(CONFIG, 0, 0.2).items()})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    texts = [torch.tensor([gpt2().encode(row["text"])]) for row in rows()["lambada_openai"][::2]]
    for _ in range(60):
        optimizer.zero_grad()
        for tokens in texts:
            net.losses(tokens[:, :-1], tokens[:, 1:])[0][:, -8:].mean().backward()
        optimizer.step()
    save(path, CONFIG, {name: array.detach().numpy() for name, array in net.named_parameters()}, gpt2())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    for task, found in rows().items():
        (path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(scope="module")
def expected(model: Path, files: Path) -> dict[str, dict[str, Any]]:
    """What the harness's own model finds."""
    from data.evaluation.harness import Tasks, answers, harness_own

    hf = harness_own(model, device="cpu", batch_size=1)
    found = {task: Tasks(specs_of(task, files / f"{task}.jsonl"), CONFIG.n_positions).by(hf, None) for task in rows()}
    return {task: {"answers": answers(r)[task], "scores": scores(score_rows(r))} for task, r in found.items()}


def scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize("task", rows())
@pytest.mark.parametrize("open", [by_tinygrad, by_torch], ids=["tinygrad", "torch_ref"])
def test_the_same_answers_and_scores(
    open: Callable[..., Any], task: str, model: Path, files: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    words = [
        "--model",
        model,
        "--tasks",
        task,
        "--data-file",
        files / f"{task}.jsonl",
        "--json",
        tmp_path / "found.json",
    ]
    evaluate(parser("evaluate", "it").parse_args([*map(str, words), "--device", "CPU"]), "it", open)
    said = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = said["answers"][task], expected[task]["answers"]
    assert len(ours) == len(theirs) == len(rows()[task])
    if task in ("nq_open", "gsm8k"):  # written
        assert ours == theirs
        assert len({str(text) for text in ours}) > 2
    else:
        np.testing.assert_allclose(values(ours), values(theirs), rtol=3e-6, atol=2e-4)  # float32, of logits around 100
    if task == "lambada_openai":
        greedy = [bool(answer[0][1]) for answer in ours]
        assert greedy == [bool(answer[0][1]) for answer in theirs] == [True, False] * 3
    assert scores(said["scores"]) == pytest.approx(expected[task]["scores"], rel=1e-4)  # exp of what is rounded


def values(answers: list[Any]) -> list[float]:
    """Of each document its log-probability."""
    return [answer[0][0] if isinstance(answer[0], list | tuple) else answer[0] for answer in answers]
