"""Models with tokenizers of their own, beside `transformers`: encodings, losses, texts, and checkpoints that are loaded
there."""

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

import tinygrad_impl.train
import torch_ref.train
from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.runs.run_folder import read_sealed
from data.testing import call, own_tokenizer, refused, save_model, write_files, write_stories
from data.text import prepare
from data.text.sampling import Sampler
from data.text.shards import open_split
from data.text.tokenizer import EOT_TEXT, gpt2, of_folder
from parity_tests.test_tokenizer import AWKWARD
from tinygrad_impl import compare, generate

TEXTS = [*AWKWARD.values(), "<|user|>Who?</s> <|user|> I\n", f"{EOT_TEXT}<pad> a"]


def save_gpt2(folder: Path, rows: int, files: dict[str, str], seed: int = 1, **settings: Any) -> Path:
    """A model of `transformers` with a tokenizer, as others publish theirs."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "initializer_range": 0.4}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, **sizes, **settings)).save_pretrained(folder)
    return write_files(folder, files)


def with_added(*special: str) -> dict[str, str]:
    """GPT-2's files with special tokens added to them."""
    described = json.loads(gpt2().files()["tokenizer.json"])
    first = described["added_tokens"][0]
    described["added_tokens"] += [first | {"id": 50257 + i, "content": text} for i, text in enumerate(special)]
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOT_TEXT, "extra_special_tokens": list(special)}
    return {"tokenizer.json": json.dumps(described), "tokenizer_config.json": json.dumps(settings)}


def older(files: dict[str, str]) -> dict[str, str]:
    """The same tokenizer in the files of before tokenizer.json."""
    described = json.loads(files["tokenizer.json"])
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"}
    return {
        "vocab.json": json.dumps(described["model"]["vocab"]),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in described["model"]["merges"]),
        "tokenizer_config.json": json.dumps(settings | {"additional_special_tokens": ["<|user|>"]}),
    }


def prefixed(files: dict[str, str]) -> dict[str, str]:
    """The same with a space before every text."""
    described = json.loads(files["tokenizer.json"])
    described["pre_tokenizer"]["add_prefix_space"] = True
    return files | {"tokenizer.json": json.dumps(described)}


MODELS: dict[str, tuple[int, Any]] = {
    "300": (300, own_tokenizer),
    "301 of 310": (310, lambda: own_tokenizer(more="<pad>")),
    "300, older files": (300, lambda: older(own_tokenizer())),
    "300, a space before": (300, lambda: prefixed(own_tokenizer())),
    "50257": (50257, lambda: gpt2().files()),
    "50258": (50258, lambda: with_added("<|user|>")),
    "50259": (50259, lambda: with_added("<|user|>", "<pad>")),
    "50304": (50304, lambda: with_added("<|user|>", "<pad>")),
}
TOKENS = {310: 301, 50304: 50259}  # where there are fewer than the model has rows
SLOW = ("300, older files", "50257", "50258", "50259", "50304")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_a_checkpoint_keeps_the_tokenizer(name: str, tmp_path: Path) -> None:
    """From a model of others through training to a checkpoint that `transformers` loads: the same files, encodings with
    and without special tokens, and end of text."""
    rows, make = MODELS[name]
    init = save_gpt2(tmp_path / "init", rows, make())
    write_stories(tmp_path / "a.txt", 120)
    options = ("--steps", 1, "--batch-size", 1, "--seq-len", 8, "--eval-tokens", 8, "--device", "CPU", "--quiet")
    result = call(torch_ref.train.main, "--init", init, "--data", "a.txt", "--out", "run", *options, cwd=tmp_path)
    assert result.code == 0, result
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    for file, text in make().items():
        assert (checkpoint / file).read_bytes() == text.encode()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(checkpoint), of_folder(checkpoint)
    assert len(theirs) == ours.vocab_size == TOKENS.get(rows, rows)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    assert theirs.eos_token_id == ours.eot == config.eos_token_id
    assert [ours.encode(text, special_tokens=True) for text in TEXTS] == theirs(TEXTS)["input_ids"]
    plain = theirs(TEXTS, split_special_tokens=True)["input_ids"]
    assert [ours.encode(text) for text in TEXTS] == plain
    assert [ours.decode(tokens) for tokens in plain] == theirs.batch_decode(plain, clean_up_tokenization_spaces=False)
    documents = ours.encode_documents(TEXTS).tolist()
    assert documents == [token for tokens in plain for token in [*tokens, theirs.eos_token_id]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of their own tokenizers, and one with GPT-2's."""
    folder = tmp_path_factory.mktemp("own")
    save_gpt2(folder / "own", 300, own_tokenizer())
    save_gpt2(folder / "spaced", 300, prefixed(own_tokenizer()), seed=2, eos_token_id=0)
    save_model(folder / "gpt2", GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=32))
    write_stories(folder / "a.txt", 120)
    return folder


@pytest.mark.slow
def test_generate_writes_what_transformers_does(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "own")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "own")
    for prompt, options in (("Ciao, naïve 🐻", ()), ("<|user|>Ciao", ("--special-tokens",))):
        ids = torch.tensor([theirs(prompt, split_special_tokens=not options)["input_ids"]])
        written = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=0, pad_token_id=0)[0]
        expected = theirs.decode(written, skip_special_tokens=False).removesuffix("</s>")
        given = ("--model", "own", "--device", "CPU", "--temperature", 0, "--max-new-tokens", 9, *options)
        for prompts in (1, 2):
            result = call(generate.main, *given, *["--prompt", prompt] * prompts, cwd=folder)
            assert result.out == "\n\n---\n".join([expected] * prompts) + "\n"


class Echo:
    """Takes a generator's place: writes each prompt once more, and keeps what it was made with and given."""

    made: ClassVar[list["Echo"]] = []

    def __init__(self, model: object, backend: object, V: int, eot: int, name: str | None = None):
        self.vocabulary, self.rows = (V, eot), list[list[int]]()
        self.made.append(self)

    def stream(self, prompts: list[list[int]], new: int, sampler: object) -> Iterator[list[Any]]:
        self.rows = prompts
        for i in range(max(map(len, prompts))):
            yield [(row[i], 0.5) if i < len(row) else None for row in prompts]

    def __call__(self, prompts: list[list[int]], new: int, sampler: object, tick: object) -> list[list[int]]:
        self.rows = prompts
        return prompts


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> list[Echo]:
    made = list[Echo]()
    monkeypatch.setattr(Echo, "made", made)
    for program in (generate, compare, tinygrad_impl.train):
        monkeypatch.setattr(program, "Generator", Echo)
    return made


@pytest.mark.parametrize("special", [False, True])
def test_prompts_and_texts_are_in_the_models_tokens(special: bool, folder: Path, echo: list[Echo]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "own")
    prompt = "<|user|>Ciao, 🐻"
    ids = theirs(prompt, split_special_tokens=not special)["input_ids"]
    options = ("--model", "own", "--device", "CPU", *(("--special-tokens",) if special else ()))
    for prompts in (1, 2):
        result = call(generate.main, *options, *("--prompt", prompt) * prompts, cwd=folder)
        assert result.out == "\n\n---\n".join([2 * prompt] * prompts) + "\n"
        assert (echo[-1].rows, echo[-1].vocabulary) == ([ids] * prompts, (300, 0))
    assert call(generate.main, *options, "--prompt", "", cwd=folder).out == "</s>\n"  # a new text begins


def loss_by_transformers(folder: Path, text: list[int], T: int) -> float:
    """The sum over all tokens but the first, in windows of T that begin anew."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    total = 0.0
    for start in range(0, len(text) - 1, T):
        row = torch.tensor([text[start : start + T + 1]])
        with torch.no_grad():
            logits = model(row[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return total


class Keeper:
    """Takes an evaluator's place: keeps the tokens of each model's windows. The first loss is 2, the second 3."""

    rows: ClassVar[list[list[int]]] = []

    def __init__(self, model: object, backend: object):
        pass

    def __call__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        batches = list(batches)
        assert {x.shape for x, _ in batches} == {(4, 16)}
        targets = np.concatenate([y.ravel() for _, y in batches])
        self.rows.append([int(batches[0][0][0, 0]), *targets[targets >= 0].tolist()])
        return 1.0 + len(self.rows)

    def of_tokens(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(x.shape, np.float32), np.ones(x.shape, bool)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compare_measures_the_same_text(
    real: bool, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bits per byte, by `transformers`' own tokenizers and models, of a text in two tokenizers."""
    rows = list[list[int]]()
    if not real:
        request.getfixturevalue("echo")
        monkeypatch.setattr(Keeper, "rows", rows)
        monkeypatch.setattr(compare, "Evaluator", Keeper)
    given: list[object] = [
        "spaced",
        "own",
        "--data",
        "a.txt",
        "--device",
        "CPU",
        "--seq-len",
        16,
    ]
    given += ("--eval-tokens", 1500, "--max-new-tokens", 3, "--prompt", "Ciao 🐻", "--html", "page.html")
    result = call(compare.main, *given, cwd=folder)
    assert result.code == 0, result
    found = read_sealed(folder / "compare.json")
    own, spaced = (transformers.AutoTokenizer.from_pretrained(folder / name) for name in ("own", "spaced"))
    row = np.concatenate(open_split(Path(folder, found["data"]), "valid"))[:1501].tolist()
    assert row[0] != 0  # the first token is text, and is no target
    documents = [own.decode(part, clean_up_tokenization_spaces=False) for part in split(row[1:], 0)]
    assert len(documents) > 1
    assert found["bytes"] == sum(len(text.encode()) for text in documents)
    again = spaced(own.decode(row[:1]))["input_ids"][-1:]
    for i, text in enumerate(documents):
        again += ([0] if i else []) + (spaced(text)["input_ids"] if text else [])
    for side, name, tokens, loss in ((0, "spaced", again, 2.0), (1, "own", row, 3.0)):
        count = len(tokens) - 1
        assert found["models"][side]["tokens"] == count
        if real:
            loss = loss_by_transformers(folder / name, tokens, 16) / count
        else:
            assert rows.pop(0) == tokens
        model = found["models"][side]
        assert model["loss"] == pytest.approx(loss, rel=1e-4)
        assert model["bits_per_byte"] == pytest.approx(loss * count / np.log(2) / found["bytes"], rel=1e-4)
    if not real:
        assert "".join(found["texts"][0]["models"][1]["samples"][0]["pieces"]) == "Ciao 🐻"
        assert "".join(found["texts"][0]["models"][0]["samples"][0]["pieces"]) == " Ciao 🐻"
    for page in (result.out, (folder / "page.html").read_text(encoding="utf-8")):
        assert "The models have different tokenizers" in page
        assert "bits per byte" in page


def split(row: list[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in row:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_training_on_data_of_another_tokenizer(folder: Path) -> None:
    """Refused, with the command that prepares it as the model needs it."""
    for name, model, options in (
        ("by-gpt2", "own", "--valid 0.2"),
        ("by-own", "gpt2", "--field 'the body' --errors replace --special-tokens"),
        ("by-spaced", "own", ""),
    ):
        words = ("a.txt", "--out", name, *shlex.split(options), "--tokenizer", name.removeprefix("by-"))
        assert call(prepare.main, *words, cwd=folder).code == 0
        given = ("--init", model, "--data", name, "--device", "CPU", "--out", "run")
        command = " ".join(f"a.txt --out DIR {options} --tokenizer {model}".split())
        theirs = f"was prepared with the tokenizer of {name.removeprefix('by-')}, which is not that of {model}; prepare"
        refusal = call(torch_ref.train.main, *given, cwd=folder)
        refused(refusal, f"{theirs} the text again with `python -m data.text.prepare {command}`")
        assert call(prepare.main, *shlex.split(command.replace("DIR", f"{name}-again")), cwd=folder).code == 0
    meta = json.loads((folder / name / "meta.json").read_text())
    del meta["given"]  # as it was before this was written
    (folder / name / "meta.json").write_text(json.dumps(meta))
    refusal = call(torch_ref.train.main, *given, cwd=folder)
    refused(refusal, "its text again with `python -m data.text.prepare SOURCE --out DIR --tokenizer own`")
    assert not (folder / "run").exists()


def test_random_weights_of_the_vocabulary_of_the_data(folder: Path, tmp_path: Path, echo: list[Echo]) -> None:
    """A model of its own tokenizer from nothing but a text, which keeps it when it is resumed."""
    assert call(prepare.main, folder / "a.txt", "--out", "data", "--tokenizer", folder / "own", cwd=tmp_path).code == 0
    options: list[object] = ["--preset", "tiny", "--data", "data", "--device", "CPU", "--steps", 2]
    options += ["--batch-size", 1, "--seq-len", 8]
    options += ("--eval-tokens", 8, "--save-every", 1)
    result = call(torch_ref.train.main, *options, "--out", "run", cwd=tmp_path)
    assert result.code == 0, result
    run = tmp_path / "run"
    config, arrays = load(run / "checkpoints" / "step-0")
    assert config.vocab_size == 300
    np.testing.assert_array_equal(arrays["wte.weight"], initial_weights(config, 1337, 0.06)["wte.weight"])
    assert of_folder(run / "checkpoints" / "step-2").files() == own_tokenizer()
    assert read_sealed(run / "run.json")["tokenizer"]["sha256"] == of_folder(folder / "own").sha256
    (run / "checkpoints" / "latest").write_text("step-1\n")
    assert call(torch_ref.train.main, "--resume", "run", cwd=tmp_path).code == 0
    assert of_folder(run / "checkpoints" / "step-2").files() == own_tokenizer()
    (run / "checkpoints" / "step-2" / "tokenizer.json").unlink()
    words = ("--model", run / "checkpoints" / "step-2")
    refused(call(generate.main, *words, cwd=tmp_path), "tokenizer.json is missing")


def test_samples_of_training_are_in_the_models_tokens(
    folder: Path, echo: list[Echo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the port, whose generator is not asked for more here; and of the reference, which writes what it says."""
    written = list[str]()
    for module in (tinygrad_impl.train, torch_ref.train):
        monkeypatch.setattr(
            module, "train", lambda _, by, files: written.append(by.continue_text("Ciao 🐻", 3, Sampler(), int))
        )
    monkeypatch.setattr(tinygrad_impl.train, "gate", lambda *_: {})
    asked = list[Any]()

    def repeat(
        model: object, prompts: list[list[int]], new: int, sampler: object, V: int, eot: int, tick: object
    ) -> list[list[int]]:
        asked.append((prompts, V, eot))
        return prompts

    monkeypatch.setattr(torch_ref.train, "generate", repeat)
    given = ("--init", "own", "--data", "a.txt", "--device", "CPU", "--batch-size", 1, "--seq-len", 8)
    for module in (tinygrad_impl.train, torch_ref.train):
        result = call(module.main, *given, cwd=folder)
        assert result.code == 0, result
    ids = of_folder(folder / "own").encode("Ciao 🐻")
    assert written == ["Ciao 🐻Ciao 🐻"] * 2
    assert asked == [([ids], 300, 0)]
    assert (echo[-1].rows, echo[-1].vocabulary) == ([ids], (300, 0))
