"""Our tokenizer gives the ids of `transformers`' GPT-2 tokenizer, which is built here from the same rank file."""

import base64
import json
import sys
import unicodedata
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data.text.tokenizer import EOT, EOT_TEXT, RANKS, hugging_face_files, tokenizer

STORIES = Path(__file__).parents[2] / "shared" / "data" / "tinystories" / "valid.txt"

AWKWARD = {
    "empty": "",
    "accents": "naïve café, Ærøskøbing, ĲSSELMEER, ﬁne",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343 क्षि ญู่",
    "emoji": "🐻👩‍👩‍👧‍👦🏳️‍🌈🇩🇰 1️⃣ ☺️☺",
    "cjk": "日本語のテキスト。中文文本，한국어 텍스트",
    "right to left": "שלום עולם مرحبا بالعالم \u202e abc",
    "whitespace": "  a   b\t\tc \t d\n\n\n e\r\n\r\n  \n f \n",
    "only whitespace": " \t \n  ",
    "unicode whitespace": "a\u00a0b\u2003 c\u3000\u3000d\u200be\u2028f\u0085g",
    "digits": "3.14159265358979 123456789012345678901234567890 ١٢٣ ⅷ ½ x²",
    "contractions": "I'm it's we'll they've can't I'd you're I'M IT'S ’s 'tis 's'S ''s",
    "punctuation": '"What?!" -- (yes)... <b>$5,000.00</b> a_b \\n #@%^&*~`|',
    "control": "".join(map(chr, [*range(32), *range(127, 160)])),
    "code points at the edges": "\ufeff\ufffd\ufffe\uffff\U0010ffff\ue000\U000e0041",
    "end of text": f"a{EOT_TEXT}b {EOT_TEXT} {EOT_TEXT}{EOT_TEXT}\n<|endoftext| |>",
    "long word": "a" * 3000 + " " + "ab" * 1000,
}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair encoding merges, first to last: the two parts a token has just before it is whole."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranked = [ranks.get(a + b, sys.maxsize) for a, b in pairwise(parts)]
            i = ranked.index(min(ranked))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


@pytest.fixture(scope="module")
def theirs() -> transformers.GPT2Tokenizer:
    characters = bytes_to_unicode()  # HF's vocabulary spells each byte as a printable character

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, RANKS.read_bytes().splitlines())}
    vocabulary = {spelled(token): rank for token, rank in ranks.items()} | {EOT_TEXT: EOT}
    return transformers.GPT2Tokenizer(vocabulary, [(spelled(a), spelled(b)) for a, b in merges(ranks)])


def assert_same(theirs: transformers.GPT2Tokenizer, texts: list[str]) -> None:
    ours = tokenizer().encode_ordinary_batch(texts, num_threads=2)
    ids = theirs(texts, split_special_tokens=True)["input_ids"]  # so that EOT_TEXT in a text is text
    wrong = [text for text, a, b in zip(texts, ours, ids, strict=True) if a != b]
    assert not wrong
    assert list(map(tokenizer().decode, ours)) == texts
    decode = partial(theirs.decode, clean_up_tokenization_spaces=False)
    assert list(map(decode, ours)) == texts


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_text(theirs: transformers.GPT2Tokenizer, text: str) -> None:
    assert_same(theirs, [text])


def test_random_unicode(theirs: transformers.GPT2Tokenizer) -> None:
    """Any character beside any other, but for unassigned ones, on which two libraries' Unicode versions may differ."""
    points = range(sys.maxunicode + 1)
    assigned = np.array([c for c in points if unicodedata.category(chr(c)) not in ("Cn", "Cs")])  # Cs: lone surrogates
    common = assigned[assigned < 0x250]  # beyond, nearly all is CJK or private
    random = np.random.default_rng(0)
    rows = [random.choice(pool, random.integers(1, 60)) for pool in (common, assigned) for _ in range(1000)]
    texts = ["".join(map(chr, row)) for row in rows]
    assert_same(theirs, texts)


def test_end_of_text_on_request(theirs: transformers.GPT2Tokenizer) -> None:
    text = AWKWARD["end of text"]
    ours = tokenizer().encode(text, allowed_special={EOT_TEXT})
    assert ours.count(EOT) == 4
    assert ours == theirs(text)["input_ids"]


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("vocab.json", "merges.txt")])
def test_the_files_beside_a_checkpoint(
    files: tuple[str, ...], theirs: transformers.GPT2Tokenizer, tmp_path: Path
) -> None:
    """`transformers` makes the same tokenizer of either form."""
    for name in files:
        (tmp_path / name).write_text(hugging_face_files()[name], encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == (EOT_TEXT, EOT, EOT + 1)
    texts = list(AWKWARD.values())
    assert loaded(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert_same(loaded, texts)


def test_tokenizer_json_by_itself(theirs: transformers.GPT2Tokenizer) -> None:
    """As `tokenizers` reads it, to which it says how text is split, and how tokens become text again."""
    loaded = tokenizers.Tokenizer.from_str(hugging_face_files()["tokenizer.json"])
    texts = list(AWKWARD.values())
    encoded = [encoding.ids for encoding in loaded.encode_batch(texts)]
    assert encoded == theirs(texts)["input_ids"]
    assert loaded.decode_batch(encoded, skip_special_tokens=False) == texts
    assert loaded.decode([EOT, 0]) == "!"


def test_the_older_files(theirs: transformers.GPT2Tokenizer) -> None:
    """Entry by entry: the vocabulary, and the merges in order, behind the line that says which version of them."""
    files = hugging_face_files()
    assert set(files) == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert json.loads(files["vocab.json"]) == theirs.get_vocab()
    first, *pairs = files["merges.txt"].splitlines()
    assert first == "#version: 0.2"
    model = json.loads(theirs.backend_tokenizer.to_str())["model"]
    assert [pair.split(" ") for pair in pairs] == [list(pair) for pair in model["merges"]]
    assert len(pairs) == 50_000
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "GPT2Tokenizer"


@pytest.mark.skipif(not STORIES.is_file(), reason="needs TinyStories in ../shared, which no clone has")
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_all_of_tinystories_valid(every: int, theirs: transformers.GPT2Tokenizer) -> None:
    stories = STORIES.read_text(encoding="utf-8").split(EOT_TEXT)
    assert len(stories) > 5000
    assert_same(theirs, stories[::every])
