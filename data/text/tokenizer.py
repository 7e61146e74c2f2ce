"""GPT-2's byte-pair encoding, through tiktoken, from the rank file that ships with the project: nothing is downloaded.

The ranks are those of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the pattern that
splits text before merging is the one of tiktoken's `r50k_base`. Licence of the rank file: gpt2.tiktoken.LICENSE.
"""

import base64
import hashlib
import json
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from data.cli import InputError

RANKS = Path(__file__).with_name("gpt2.tiktoken")
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

EOT_TEXT = "<|endoftext|>"
EOT = 50256  # separates documents
VOCAB_SIZE = 50257


class _OfThread(threading.local):
    encoding: tiktoken.Encoding | None = None


_of_thread = _OfThread()


def tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding. `encode_ordinary(text)` never yields `EOT`, whatever the text; `decode(ids)` inverts it.

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
def hugging_face_files() -> dict[str, str]:
    """The same encoding as the files that `transformers` and `tokenizers` load, by name: tokenizer.json, and its older
    form, vocab.json and merges.txt.

    They spell the bytes of a token as printable characters (`encoder.py` of OpenAI's gpt-2), and list pairs of parts
    where tiktoken lists what they merge into: the parts are what is left of a token before its last merge.
    """
    tokenizer()  # refuses a rank file that is missing or damaged
    ranks = _ranks(RANKS.read_bytes())
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

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
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": EOT_TEXT}),
    }
