"""Tokenizers: from text to tokens and back, as a model's own files say it, or GPT-2's where there are none.

GPT-2's byte-pair encoding goes through tiktoken, from the rank file that ships with the project: nothing is downloaded.
The ranks are those of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the pattern that
splits text before merging is the one of tiktoken's `r50k_base`. Licence of the rank file: gpt2.tiktoken.LICENSE.
Every other tokenizer goes through Hugging Face's `tokenizers` (data/text/model_tokenizer.py).
"""

import base64
import codecs
import hashlib
import json
import shlex
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from data.checkpoints.tensors import read_json
from data.cli import InputError

RANKS = Path(__file__).with_name("gpt2.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

EOT_TEXT = "<|endoftext|>"
EOT = 50256  # separates documents
VOCAB_SIZE = 50257
PADDED_SIZE = 50304  # to which training programs pad GPT-2's vocabulary, for speed
LARGEST_VOCAB = 2**16  # whose tokens fit in the uint16 of a shard

# The files of a model's folder that a tokenizer is read from, or that `transformers` reads beside it.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
)
OTHER_FILES = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")  # of kinds not read here


class Tokenizer(ABC):
    """A model's tokenizer.

    name: whose it is, for people: `gpt2`, or a folder.
    sha256: of all that decides which tokens a text has, and of the end-of-text token: where it is equal, so are they.
      Special tokens do not count, which text never gives unless asked; with them it is `special_sha256`.
    vocab_size: every token is below it.
    eot: the end-of-text token, which ends a document.
    """

    name: str
    sha256: str
    special_sha256: str
    vocab_size: int
    eot: int

    @abstractmethod
    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """The tokens of a text. What spells a special token is text, or, with `special_tokens`, that token."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[str], special_tokens: bool = False) -> np.ndarray:
        """The tokens of documents, uint16 of shape (tokens,), `eot` after each; fast, and from any thread."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character's in UTF-8."""

    @abstractmethod
    def files(self, context: int | None = None) -> dict[str, str]:
        """The files, by name, that make `transformers` load this tokenizer; they are saved with a checkpoint.

        Those that came with a model are as they were. Others say `context`: how many tokens the model takes.
        """

    def missing_bytes(self) -> int:
        """How many bytes of UTF-8 it has no token for, so that text which has them loses them."""
        return 0

    @property
    def bytewise(self) -> bool:
        """Whether a token's bytes are the same in any text, so that those of its tokens are the bytes of a text."""
        return True

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def incremental(self, before: Sequence[int]) -> Callable[[int | None], str]:
        """A function for tokens that come one by one, after those `before`: it takes the next, and gives the text that
        is certain now. A character whose bytes are spread over several tokens comes with the last of them. For None it
        gives the rest. Together it is what decoding all at once gives.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(b"" if token is None else self.token_bytes(token), final=token is None)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's. `own_files` are those of a model's folder, which are kept where they say the same in another way."""

    name, sha256, special_sha256, vocab_size, eot = "gpt2", RANKS_SHA256, RANKS_SHA256, VOCAB_SIZE, EOT

    def __init__(self, own_files: Mapping[str, str]):
        self._own_files = own_files

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        encoding = tokenizer()
        return encoding.encode(text, allowed_special="all") if special_tokens else encoding.encode_ordinary(text)

    def encode_documents(self, documents: Sequence[str], special_tokens: bool = False) -> np.ndarray:
        encoding = tokenizer()
        # One long call runs without Python's global lock nearly all the time, one call a document only half of it.
        text = EOT_TEXT.join([*documents, ""])
        if not special_tokens and text.count(EOT_TEXT) > len(documents):
            # a document has the marker in its text, where it stays text
            parts = [np.append(encoding.encode_to_numpy(text, disallowed_special=()), EOT) for text in documents]
            return np.concatenate(parts).astype(np.uint16)
        return encoding.encode_to_numpy(text, allowed_special={EOT_TEXT}).astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        return tokenizer().decode_single_token_bytes(token)

    def files(self, context: int | None = None) -> dict[str, str]:
        files = hugging_face_files()
        if context is not None:
            settings = json.loads(files["tokenizer_config.json"]) | {"model_max_length": context}
            files = files | {"tokenizer_config.json": json.dumps(settings)}
        return files | dict(self._own_files)


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer: that of the presets, and of models that come without one."""
    return GPT2Tokenizer({})


def of_folder(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of the model in `folder`, by the files there; GPT-2's where there are none and the model has
    GPT-2's vocabulary, which a note on stderr says. vocab_size: the model's; None: as config.json there says.

    Raises `InputError` where the files are damaged, of a kind that cannot be loaded, or name no end-of-text token; and
    where the model has fewer tokens than the tokenizer, or no tokenizer and another vocabulary than GPT-2's.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    rows, files = vocab_size or config.get("vocab_size"), read_files(folder)
    if "tokenizer.json" in files or "vocab.json" in files:
        found = from_files(str(folder), files, config.get("eos_token_id"))
    elif other := [name for name in OTHER_FILES if (folder / name).exists()]:
        raise InputError(f"{folder} has its tokenizer as {other[0]}, which is not read here; {converting(folder)}")
    elif isinstance(rows, int) and VOCAB_SIZE <= rows <= PADDED_SIZE:
        print(f"note: {folder} has no tokenizer; GPT-2's is taken, as the vocabulary has its size", file=sys.stderr)
        return gpt2()
    else:
        size = f"a vocabulary of {rows}" if rows else "no config.json"
        raise InputError(
            f"{folder} has no tokenizer (no tokenizer.json, nor vocab.json with merges.txt) and {size}, so it is not "
            "GPT-2's either; copy the tokenizer's files there"
        )
    if isinstance(rows, int) and found.vocab_size > rows:
        raise InputError(
            f"{folder}: the model has {rows} tokens, the tokenizer {found.vocab_size}; put the tokenizer there that "
            "the model was trained with"
        )
    if missing := found.missing_bytes():
        print(
            f"note: the tokenizer of {folder} has no token for {missing} of the 243 bytes of UTF-8: it drops them",
            file=sys.stderr,
        )
    return found


def from_files(name: str, files: Mapping[str, str], eos_token_id: object) -> Tokenizer:
    """The tokenizer that files of a folder describe, through tiktoken if it is GPT-2's, or else through `tokenizers`.

    eos_token_id: the end-of-text token by the model's config.json, for files that name none.
    """
    from data.text.model_tokenizer import ModelTokenizer, describe, is_gpt2  # here, because it builds on this module

    description = describe(name, files)
    return GPT2Tokenizer(files) if is_gpt2(description) else ModelTokenizer(name, files, description, eos_token_id)


def converting(folder: str | Path) -> str:
    """What to do with a tokenizer that only `transformers` reads."""
    code = (
        "import sys, transformers as t; "
        "[A.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for A in (t.AutoTokenizer, t.GPT2LMHeadModel)]"
    )
    return f"write it as tokenizer.json, `python -c '{code}' {shlex.quote(str(folder))} converted`, and pass converted"


def read_files(folder: Path) -> dict[str, str]:
    """The tokenizer's files in a folder, by name, their line ends as they are."""
    files = {}
    for name in FILES:
        if (folder / name).is_file():
            try:
                files[name] = (folder / name).read_bytes().decode("utf-8")
            except UnicodeDecodeError as e:
                raise InputError(f"{folder / name} is damaged ({e}); download or copy it again") from None
    return files


class _OfThread(threading.local):
    encoding: tiktoken.Encoding | None = None


_of_thread = _OfThread()


def tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding in tiktoken. `encode_ordinary(text)` never yields `EOT`; `decode(ids)` inverts it.

    `encode(text, allowed_special={EOT_TEXT})` is the way to ask for `EOT`. Raises `InputError` when the rank file
    is missing or damaged.

    Every thread has its own (18 MB, 0.04 s): a regex of tiktoken's is fast for the first thread that uses it, and takes
    all others a third longer.
    """
    if _of_thread.encoding is None:
        _of_thread.encoding = read_encoding()
    return _of_thread.encoding


def read_encoding() -> tiktoken.Encoding:
    """A new one, from the rank file."""
    try:
        raw = RANKS.read_bytes()
    except FileNotFoundError:
        raise InputError(f"the tokenizer's rank file {RANKS} is missing; check out the project again") from None
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise InputError(
            f"the tokenizer's rank file {RANKS} is damaged (its sha256 differs); check out the project again"
        )
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=_ranks(raw),
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _ranks(raw: bytes) -> dict[bytes, int]:
    """The tokens of a rank file, in the order in which byte-pair encoding merges them."""
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}


@cache
def byte_characters() -> dict[str, bytes]:
    """The printable characters that spell bytes in Hugging Face's files (`encoder.py` of OpenAI's gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {character: bytes([byte]) for byte, character in characters.items()}


@cache
def hugging_face_files() -> dict[str, str]:
    """The same encoding as the files that `transformers` and `tokenizers` load, by name: tokenizer.json, and its older
    form, vocab.json and merges.txt.

    They list pairs of parts where tiktoken lists what they merge into: the parts are what is left of a token before
    its last merge.
    """
    tokenizer()  # refuses a rank file that is missing or damaged
    ranks = _ranks(RANKS.read_bytes())
    characters = {byte[0]: character for character, byte in byte_characters().items()}

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            merged = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = merged.index(min(merged))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spelled(parts[0]), spelled(parts[1])))
    vocabulary = {spelled(token): rank for token, rank in ranks.items()} | {EOT_TEXT: EOT}

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(EOT_TEXT)])
    return {
        "tokenizer.json": bpe.to_str(),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOT_TEXT, "pad_token": EOT_TEXT}
        ),
    }
