"""What tests of all packages share: commands called in this process, and models and text that train in seconds."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data.checkpoints.checkpoint import save
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.cli import run
from data.text.shards import ShardWriter, write_meta
from data.text.stories import stories
from data.text.tokenizer import VOCAB_SIZE, gpt2

SMALL = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def call(main: Callable[[], None], *argv: object, cwd: Path) -> Result:
    """Runs a command as `python -m` would, in the folder `cwd`. An exception that it lets out is raised here too."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["command", *map(str, argv)])
        patch.setattr("data.cli.interpreter", lambda: "python")  # in the commands that are printed
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as ended:
            run(main)
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, out.getvalue(), err.getvalue())


def refused(result: Result, *words: str) -> None:
    """Asserts that bad input ended a command as it should: exit code 2 and one sentence, with these words in it."""
    assert result.code == 2, result
    said = [line for line in result.err.splitlines() if not re.match(r"[\w ,()]+: +\d+%\|", line)]  # but for progress
    assert len(said) == 1, result.err
    assert said[0].startswith("error: ")
    for word in words:
        assert word in said[0]


def save_model(folder: Path, config: GPT2Config = SMALL, seed: int = 1) -> Path:
    """Writes random weights. No bias is 0 and no gain 1: those would hide that one is left out."""
    random = np.random.default_rng(seed)
    arrays = initial_weights(config, seed)
    for name, array in arrays.items():
        if array.ndim == 1:
            arrays[name] = array + 0.1 * random.standard_normal(array.shape, np.float32)
    save(folder, config, arrays, gpt2() if config.vocab_size >= VOCAB_SIZE else None)
    return folder


def own_tokenizer(more: str | None = None) -> dict[str, str]:
    """The files of a tokenizer that is not GPT-2's, of 300 tokens: </s> (0), which ends texts, <|user|> (1), bytes, and
    pairs of them. `more` is another special token (300).
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["</s>", "<|user|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(islice(stories(7), 30), trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "extra_special_tokens": ["<|user|>"]}
    bpe.add_special_tokens([more] if more else [])
    return {"tokenizer.json": bpe.to_str(), "tokenizer_config.json": json.dumps(settings)}


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


def write_stories(path: Path, count: int = 300) -> Path:
    """A .txt of so many documents that some fall to validation."""
    path.write_text("\n<|endoftext|>\n".join(islice(stories(5), count)), encoding="utf-8")
    return path


def write_tokens(folder: Path, train: np.ndarray, valid: np.ndarray) -> Path:
    """A prepared folder of the given tokens."""
    folder.mkdir()
    splits = {}
    for split, tokens in {"train": train, "valid": valid}.items():
        with ShardWriter(folder, split) as writer:
            writer.write(tokens.astype(np.uint16))
        splits[split] = {"source": "", "documents": 1, "tokens": len(tokens), "shards": writer.shards}
    write_meta(folder, splits)
    return folder
