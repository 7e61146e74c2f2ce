"""A model's own tokenizer, from the files of its folder, through Hugging Face's `tokenizers`."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from data.cli import InputError
from data.text.tokenizer import EOT, EOT_TEXT, LARGEST_VOCAB, RANKS_SHA256, Tokenizer, byte_characters, converting

# of GPT-2's vocabulary and merges, as `digest` has it: of those in `hugging_face_files`
GPT2_BPE = "45b462fced1d5a9ae683e420fa436dd4c5b5153b3206d37368304cb02b9de931"
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
CONTEXT = 16  # tokens that decide how the next one is spelled, where a decoder looks at others at all
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

Description = dict[str, Any]  # what a tokenizer.json holds


def describe(name: str, files: Mapping[str, str]) -> Description:
    """The tokenizer in a folder's files, as a tokenizer.json would describe it: from one, or from vocab.json and
    merges.txt; with the special and added tokens of the files beside them.

    Raises `InputError` where a file is missing or damaged, or the tokenizer is one that `tokenizers` cannot compute.
    """
    settings, named = read(name, files, "tokenizer_config.json"), read(name, files, "special_tokens_map.json")
    kind = settings.get("tokenizer_class")
    if settings.get("auto_map"):
        raise InputError(
            f"{name}: its tokenizer is code that comes with the model (auto_map in tokenizer_config.json), which is "
            "never run; choose a model with a tokenizer.json that says all"
        )
    description = read(name, files, "tokenizer.json")
    try:
        if not description:
            if kind not in (None, *GPT2_CLASSES):
                raise InputError(
                    f"{name}: its tokenizer is a {kind} without tokenizer.json, which is not read here; "
                    + converting(name)
                )
            if "merges.txt" not in files:
                raise InputError(f"{name} has vocab.json but not merges.txt; copy that there too")
            lines = files["merges.txt"].replace("\r\n", "\n").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            model = {"type": "BPE", "vocab": read(name, files, "vocab.json"), "merges": merges}
            description = {"version": "1.0", "added_tokens": [], "pre_tokenizer": dict(BYTE_LEVEL), "model": model}
        before, model = description.get("pre_tokenizer") or {}, description["model"]
        if kind in (None, *GPT2_CLASSES) and before.get("type") == "ByteLevel":
            # as `transformers` has it: of GPT-2's class, this is a setting of tokenizer_config.json alone
            before["add_prefix_space"] = bool(settings.get("add_prefix_space"))
        if before.get("type") == "ByteLevel" and not description.get("decoder"):
            description["decoder"] = dict(BYTE_LEVEL)
        # these are for training, and would cut texts off, fill them up, or split them at random
        description["truncation"] = description["padding"] = model["dropout"] = None
        description["added_tokens"] = added_tokens(description, settings, named, read(name, files, "added_tokens.json"))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise InputError(f"{name}: the files of its tokenizer are damaged ({repr(e)[:200]}); copy them again") from None
    return description


def read(name: str, files: Mapping[str, str], file: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one, where there is no such file."""
    try:
        value = json.loads(files.get(file, "{}"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{name}/{file} is damaged ({e}); download or copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}/{file} is damaged (no JSON object); download or copy it again")
    return value


def added_tokens(
    description: Description, settings: dict[str, Any], named: dict[str, Any], added: dict[str, Any]
) -> list[dict[str, Any]]:
    """The added tokens by their ids: those of the description, and those that only the files beside it have."""
    found = {int(token["id"]): dict(token) for token in description.get("added_tokens") or []}
    special = special_spellings(settings) | special_spellings(named)
    vocabulary = description["model"].get("vocab")
    ids = vocabulary if isinstance(vocabulary, dict) else {}
    others = {int(i): dict(token) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    others |= {int(i): {"content": text} for text, i in added.items() if int(i) not in others}
    others |= {int(ids[text]): {"content": text} for text in special if text in ids and int(ids[text]) not in others}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for i, token in others.items():
        found.setdefault(i, plain | {name: token[name] for name in (*plain, "content") if name in token})
    for i, token in found.items():
        token |= {"id": i, "special": token.get("special", False) or token["content"] in special}
    return [found[i] for i in sorted(found)]


def special_spellings(settings: dict[str, Any]) -> set[str]:
    """The special tokens that a tokenizer_config.json or a special_tokens_map.json names."""
    named = [value for key, value in settings.items() if key.endswith("_token") and not isinstance(value, bool)]
    for more in ("additional_special_tokens", "extra_special_tokens"):  # two versions' names for the same
        tokens = settings.get(more) or []
        named += tokens.values() if isinstance(tokens, dict) else tokens
    return {spelling(token) for token in named if token}


def spelling(token: Any) -> str:
    """A token as these files have it: its text, or an object that holds it."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no token")
    return text


def is_gpt2_text(description: Description) -> bool:
    """Whether it gives any text the tokens of GPT-2's, special tokens apart."""
    model, before = description["model"], description.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or description.get("normalizer"):
        return False
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    return (
        isinstance(before, dict)
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space", True)
        and before.get("use_regex", True)
        and not any(model.get(name) for name in odd)
        and all(token["special"] for token in description["added_tokens"])
        and digest(model) == GPT2_BPE
    )


def is_gpt2(description: Description) -> bool:
    """Whether it is GPT-2's tokenizer, with no other special token than GPT-2's."""
    added = description["added_tokens"]
    spellings = {(token["id"], token["content"]) for token in added} | {(EOT, EOT_TEXT)}
    return len(added) <= 1 and len(spellings) == 1 and not strips(added) and is_gpt2_text(description)


def strips(added: Sequence[dict[str, Any]]) -> bool:
    """Whether one of the added tokens takes text around it along."""
    return any(token.get(name) for token in added for name in ("single_word", "lstrip", "rstrip"))


def digest(model: dict[str, Any]) -> str:
    """The SHA-256 of a byte-pair encoding: of its vocabulary by ids, and its merges in order."""
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return ""
    pairs = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]
    tokens = sorted((str(i), token) for token, i in vocabulary.items())
    return hashlib.sha256(json.dumps([tokens, pairs]).encode()).hexdigest()


class ModelTokenizer(Tokenizer):
    """The tokenizer of `description`, read from `files`. `eos_token_id`: as `from_files` has it.

    Raises `InputError` where `tokenizers` does not take it, it has too many tokens, or none that ends a text.
    """

    def __init__(self, name: str, files: Mapping[str, str], description: Description, eos_token_id: object):
        self.name, self._files, self._description = name, dict(files), description
        try:
            self._text = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as e:  # the library raises bare ones
            raise InputError(
                f"{name}: the files of its tokenizer are damaged ({str(e)[:200]}); copy them again"
            ) from None
        self._text.encode_special_tokens = True  # as text
        self._ids: dict[str, int] = self._text.get_vocab(with_added_tokens=True)
        self._added: dict[int, str] = {token["id"]: token["content"] for token in description["added_tokens"]}
        if wrong := [text for i, text in self._added.items() if self._ids.get(text) != i]:
            raise InputError(f"{name}: its tokenizer's files disagree on the token {wrong[0]!r}; copy them again")
        if len(set(self._ids.values())) < len(self._ids):
            raise InputError(f"{name}: two tokens of its tokenizer have the same number; copy its files again")
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        if self.vocab_size > LARGEST_VOCAB:
            raise InputError(
                f"{name}: its tokenizer has {self.vocab_size:,} tokens, more than the {LARGEST_VOCAB:,} that 16 bits "
                "of prepared data can tell apart; choose a model of fewer"
            )
        self.eot = self._end_of_text(eos_token_id)
        self._bytes = byte_characters() if self._is_byte_level() else {}

    def _end_of_text(self, eos_token_id: object) -> int:
        """The token of the name that the files have for it; or of the number in config.json, unless text gives that
        token too, as of a number that was never set; or the one that is spelled like GPT-2's.
        """
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            named = read(self.name, self._files, file).get("eos_token")
            if named and not isinstance(named, bool) and spelling(named) in self._ids:
                return self._ids[spelling(named)]
        number = eos_token_id[0] if isinstance(eos_token_id, list) and eos_token_id else eos_token_id
        if type(number) is int and (text := self._text.id_to_token(number) if number >= 0 else None):
            spelled = text if number in self._added else self._text.decode([number], skip_special_tokens=False)
            if "\ufffd" not in spelled and number not in self.encode(spelled):
                return number
        if EOT_TEXT in self._ids:
            return self._ids[EOT_TEXT]
        raise InputError(
            f"{self.name}: its tokenizer names no token that ends a text; give tokenizer_config.json there an "
            '"eos_token" that is in its vocabulary'
        )

    def _is_byte_level(self) -> bool:
        decoder = self._description.get("decoder")
        return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        """The same, with special tokens wherever text spells them: a second one, since threads share both."""
        special = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        special.encode_special_tokens = False
        return special

    @cached_property
    def sha256(self) -> str:  # type: ignore[override]  # computed when it is asked for, as that takes a while
        """Equal for GPT-2's and one that only adds special tokens to it."""
        if self.eot == EOT and is_gpt2_text(self._description):
            return RANKS_SHA256
        whole = json.loads(self._text.to_str())  # in the library's one way to write it
        ordinary = [token for token in whole["added_tokens"] if not token["special"]]
        decides = [whole["normalizer"], whole["pre_tokenizer"], whole["model"], ordinary, self.eot]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    @cached_property
    def special_sha256(self) -> str:  # type: ignore[override]
        special = [token for token in self._description["added_tokens"] if token["special"]]
        return hashlib.sha256(json.dumps([self.sha256, special], sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        chosen = self._special if special_tokens else self._text
        return list(chosen.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, documents: Sequence[str], special_tokens: bool = False) -> np.ndarray:
        chosen, row = self._special if special_tokens else self._text, list[int]()
        for encoded in chosen.encode_batch_fast(list(documents), add_special_tokens=False):
            row += encoded.ids
            row.append(self.eot)
        return np.array(row, np.uint16)

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if not self._bytes:
            return self.decode([token]).encode()
        spelled: str = self._text.id_to_token(token) or ""  # none: a number that was left out
        return b"".join(self._bytes.get(c, c.encode()) for c in spelled)

    @property
    def bytewise(self) -> bool:
        return bool(self._bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        if self._bytes:
            return super().decode(tokens)
        return str(self._text.decode(list(tokens), skip_special_tokens=False))

    def incremental(self, before: Sequence[int]) -> Callable[[int | None], str]:
        if self._bytes:
            return super().incremental(before)
        window = list(before)[-CONTEXT:]
        shown = self.decode(window)

        def following(token: int | None) -> str:
            nonlocal window, shown
            window += [] if token is None else [token]
            text = self.decode(window)
            if token is not None and text.endswith("\ufffd"):  # half a character
                return ""
            new, window = text[len(shown) :], window[-CONTEXT:]
            shown = self.decode(window)
            return new

        return following

    def files(self, context: int | None = None) -> dict[str, str]:
        return dict(self._files)

    def missing_bytes(self) -> int:
        never = {0xC0, 0xC1, *range(0xF5, 0x100)}
        return sum(byte[0] not in never and c not in self._ids for c, byte in self._bytes.items())
