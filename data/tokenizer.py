"""GPT-2's byte-pair encoding, through tiktoken, from the rank file that ships with the project: nothing is downloaded.

The ranks are those of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the pattern that
splits text before merging is the one of tiktoken's `r50k_base`. Licence of the rank file: gpt2.tiktoken.LICENSE.
"""

import base64
import hashlib
import threading
from pathlib import Path

import tiktoken
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
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines())}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )
