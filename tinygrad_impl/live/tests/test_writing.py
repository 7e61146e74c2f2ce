"""What the models write, and what is said of each word. The reference's logits decide."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import torch_ref.model
from data.checkpoints.checkpoint import load, resolve
from data.checkpoints.config import GPT2Config
from data.testing import call, own_tokenizer, save_model, write_files
from data.text.tokenizer import EOT, VOCAB_SIZE, Tokenizer, gpt2, of_folder
from tinygrad_impl import generate
from tinygrad_impl.backend import Plain
from tinygrad_impl.generate import Drawn, Generator
from tinygrad_impl.live.tests.support import asked
from tinygrad_impl.live.turns import Event
from tinygrad_impl.live.writing import Model, Watching, shown, write
from tinygrad_impl.losses import NextLosses
from tinygrad_impl.model import GPT2

CONFIG = GPT2Config(vocab_size=303, n_layer=1, n_head=2, n_embd=16, n_positions=24)
SETTINGS = {"temperature": 1.2, "top_k": 200, "top_p": 0.95, "seed": 6, "max_new_tokens": 30}
PROMPT = "One day, a little girl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [save_model(tmp_path_factory.mktemp("model"), CONFIG, seed) for seed in (1, 2)]
    return [write_files(folder, own_tokenizer()) for folder in made]


@pytest.fixture(scope="module")
def models(folders: list[Path]) -> list[Model]:
    found = []
    for folder in folders:
        tokenizer = of_folder(resolve(folder), CONFIG.vocab_size)
        generator = Generator(GPT2(*load(folder)), Plain(), tokenizer.vocab_size, tokenizer.eot)
        found.append(Model(tokenizer, generator, {}))
    return found


@pytest.fixture(scope="module")
def events(models: list[Model]) -> list[Event]:
    return list(write(models, asked(PROMPT, **SETTINGS)))


def of(events: list[Event], model: int, kind: str = "piece") -> list[Event]:
    return [event for event in events if event.get("model") == model and event["event"] == kind]


def tokens_of(events: list[Event], model: int) -> list[dict[str, Any]]:
    return [token for kind in ("piece", "end") for event in of(events, model, kind) for token in event["tokens"]]


def test_it_writes_what_generate_writes(
    events: list[Event], models: list[Model], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same settings, beyond the context too."""
    texts = []
    for i, folder in enumerate(folders):
        monkeypatch.setattr(generate, "Generator", lambda *_, i=i: models[i].generator)  # which has compiled already
        options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
        result = call(generate.main, "--model", folder, "--device", "CPU", "--prompt", PROMPT, *options, cwd=folder)
        assert result.code == 0, result
        text = "".join(event["text"] for event in of(events, i))
        assert PROMPT + text.rstrip("\ufffd") == result.out.removesuffix("\n").rstrip("\ufffd")
        texts.append(text)
    assert len(tokens_of(events, 0)) == len(tokens_of(events, 1)) == SETTINGS["max_new_tokens"] > CONFIG.n_positions
    assert texts[0] != texts[1]


def test_the_same_random_numbers_for_all(events: list[Event], models: list[Model]) -> None:
    """So that a model writes the same, whichever stands beside it, and where."""
    other = list(write(models[::-1], asked(PROMPT, **SETTINGS)))
    for i in (0, 1):
        assert [token["token"] for token in tokens_of(events, i)] == [
            token["token"] for token in tokens_of(other, 1 - i)
        ]


@torch.no_grad()
def test_probabilities_and_alternatives_are_those_of_each_word(
    events: list[Event], folders: list[Path], models: list[Model]
) -> None:
    """The model's own, whatever temperature, top-k and top-p make of them."""
    for i, folder in enumerate(folders):
        reference, row = torch_ref.model.GPT2(*load(folder)), models[i].tokenizer.encode(PROMPT)
        for token in tokens_of(events, i)[: CONFIG.n_positions - len(row)]:
            p = reference(torch.tensor([row]))[0][0, -1, : models[i].tokenizer.vocab_size].double().softmax(-1)
            assert token["p"] == pytest.approx(p[token["token"]].item(), rel=1e-4)
            top = p.topk(5)
            assert [other["token"] for other in token["likeliest"]] == top.indices.tolist()
            assert [other["p"] for other in token["likeliest"]] == pytest.approx(top.values.tolist(), rel=1e-4)
            row.append(token["token"])
        for event in of(events, i):
            assert event["p"] == pytest.approx(math.prod(token["p"] for token in event["tokens"]))


def test_models_take_turns(events: list[Event], models: list[Model]) -> None:
    """Words of all appear from the first on, and what begins and ends is said."""
    first, *rest = events
    note = "a text of more than 24 tokens goes on from its last 12"
    assert first == {
        "event": "start",
        "models": 2 * [{"tokens": len(models[0].tokenizer.encode(PROMPT)), "note": note}],
    }
    assert [event["model"] for event in rest[:6]] == [0, 1, 0, 1, 0, 1]
    assert [event["why"] for i in range(2) for event in of(events, i, "end")] == ["length"] * 2
    assert rest[-1] == {"event": "done"}
    json.dumps(events, allow_nan=False)


class Scripted:
    """Takes a generator's place: its model wants these tokens, one after the other."""

    def __init__(self, *tokens: int):
        self.tokens, self.model = tokens, SimpleNamespace(config=CONFIG)

    def stream(self, rows: list[list[int]], new: int, sampler: Watching) -> Iterator[list[Drawn | None]]:
        self.rows = rows
        for token in self.tokens[:new]:
            logits = np.zeros((1, VOCAB_SIZE), np.float32)
            logits[0, token] = 9
            [drawn] = sampler(logits).tolist()
            if drawn == EOT:
                return
            yield [(drawn, math.nan)]  # the page has those of the losses


def scripted(*tokens: int, new: int = 99, special: bool = False) -> tuple[list[Event], Event]:
    """The pieces and the end of a text."""
    generator: Any = Scripted(*tokens)
    given = asked("<|endoftext|>", temperature=0, max_new_tokens=new)
    given = type(given)(given.prompt, given.settings, special)
    events = list(write([Model(gpt2(), generator, {})], given))
    assert generator.rows == [gpt2().encode(given.prompt, special)]
    assert (generator.rows == [[EOT]]) == special
    *found, end, done = events[1:]
    assert done["event"] == "done"
    return found, end


@pytest.mark.parametrize("special", [False, True])
def test_no_half_of_a_character_is_shown(special: bool) -> None:
    text = "ï 🦙🙂日本"
    tokens = gpt2().encode(text)
    assert len(tokens) > len(text)
    for count in range(1, len(tokens) + 1):
        found, end = scripted(*tokens, new=count, special=special)
        shown_text = "".join(event["text"] for event in found)
        assert "\ufffd" not in shown_text
        assert text.startswith(shown_text)
        seen = [token for event in [*found, end] for token in event["tokens"]]
        assert [token["token"] for token in seen] == tokens[:count]  # each once, in order
        assert end["why"] == "length"
        for token in end["tokens"]:
            assert token["text"] == f"(bytes {gpt2().token_bytes(token['token']).hex(' ').upper()})"
    assert shown_text == text
    assert end["tokens"] == []


def test_the_end_of_a_text_has_its_probability_too() -> None:
    token = gpt2().encode("a")[0]
    found, end = scripted(token, EOT)
    assert [event["text"] for event in found] == ["a"]
    [last] = end["tokens"]
    assert (end["why"], last["token"], last["text"]) == ("end of text", EOT, "(end of text)")
    assert last["p"] == pytest.approx(math.exp(9) / (math.exp(9) + VOCAB_SIZE - 1))
    # of equal ones the lowest, and the drawn one among them
    assert [other["token"] for other in last["likeliest"]][:1] == [EOT]
    assert len(last["likeliest"]) == 5


def test_broken_weights_have_no_probabilities(models: list[Model]) -> None:
    """JSON has no number for them."""
    tokenizer: Tokenizer = models[0].tokenizer
    sampler = Watching(NextLosses(), temperature=0)
    with np.errstate(all="ignore"):
        sampler(np.full((1, 300), np.nan, np.float32))
        [token] = shown(sampler.take(), tokenizer)
    assert token["p"] is None
    assert sampler.take() == []
    json.dumps(token, allow_nan=False)


def test_few_tokens_are_all_shown(models: list[Model]) -> None:
    sampler = Watching(NextLosses(), temperature=0)
    sampler(np.array([[1, 3, 2]], np.float32))
    [step] = sampler.take()
    assert [token for token, _ in step.likeliest] == [1, 2, 0]
    assert sum(p for _, p in step.likeliest) == pytest.approx(1)
