"""A model's own tokenizer: which its folder says, what it does with text, and what is refused."""

import json
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data.cli import InputError
from data.testing import call, own_tokenizer, refused, write_files, write_stories
from data.text import model_tokenizer, prepare, shards
from data.text.model_tokenizer import ModelTokenizer, describe, is_gpt2, is_gpt2_text
from data.text.shards import open_split, read_meta, tokenizer_of, verify_folder
from data.text.tokenizer import EOT, RANKS_SHA256, GPT2Tokenizer, from_files, gpt2, of_folder

TEXT = "Once upon a time</s> <|user|>, naïve 🐻 日本語\n\n <|endoftext|>"
GPT2S = {"model_type": "gpt2", "vocab_size": 50257, "eos_token_id": 50256}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return own_tokenizer()


@pytest.fixture(scope="module")
def own(files: dict[str, str]) -> ModelTokenizer:
    made = from_files("own", files, None)
    assert isinstance(made, ModelTokenizer)
    return made


def changed(text: str, **changes: Any) -> str:
    return json.dumps(json.loads(text) | changes)


# What it does with text


def test_text_and_back(own: ModelTokenizer) -> None:
    """What spells a special token is text, unless it is asked for."""
    assert (own.vocab_size, own.eot) == (300, 0)
    for special, count in ((False, 0), (True, 1)):
        tokens = own.encode(TEXT, special)
        assert own.decode(tokens) == TEXT
        assert (tokens.count(0), tokens.count(1)) == (count, count)
    assert own.encode("") == []


def test_documents(own: ModelTokenizer) -> None:
    documents = ["one", "", TEXT, "two"]
    for special in (False, True):
        tokens = own.encode_documents(documents, special)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [token for text in documents for token in [*own.encode(text, special), 0]]
    assert gpt2().encode_documents(["a<|endoftext|>b"], special_tokens=True).tolist() == [64, EOT, 65, EOT]
    assert gpt2().encode("a<|endoftext|>b", special_tokens=True) == [64, EOT, 65]


def test_text_as_it_comes(own: ModelTokenizer) -> None:
    """A character comes with the last of its bytes; what is left of one comes at the end."""
    tokens = own.encode(TEXT, special_tokens=True)
    for count in (len(tokens), tokens.index(own.encode("🐻")[0]) + 2):
        following = own.incremental([])
        came = [following(token) for token in [*tokens[:count], None]]
        assert "".join(came) == own.decode(tokens[:count])
        assert [text for text in came[:-1] if "\ufffd" in text] == []
    assert own.token_bytes(1) == b"<|user|>"


def test_words_that_depend_on_those_before() -> None:
    """Of a decoder that puts spaces between words; what comes after a prompt is as it is behind that."""
    vocabulary = {text: i for i, text in enumerate(["[UNK]", "[SEP]", "the", "dog", "##s", "ran"])}
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = tokenizers.decoders.WordPiece()
    files = {"tokenizer.json": wordpiece.to_str(), "tokenizer_config.json": '{"eos_token": "[SEP]"}'}
    tokenizer = from_files("words", files, None)
    before, new = tokenizer.encode("the dog"), tokenizer.encode("dogs ran the dogs " * 9)
    following = tokenizer.incremental(before)
    came = [following(token) for token in [*new, None]]
    assert came[:4] == [" dog", "s", " ran", " the"]
    assert "the dog" + "".join(came) == tokenizer.decode(before + new)


def test_what_would_cut_or_fill_texts_is_ignored(own: ModelTokenizer, files: dict[str, str]) -> None:
    described = json.loads(files["tokenizer.json"])
    described["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    described["padding"] = {"strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None}
    described["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "</s>"}
    described["model"]["dropout"] = 0.9
    described["post_processor"] = {
        **{
            "type": "TemplateProcessing",
            "pair": [],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
        },
        "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    other = from_files("own", files | {"tokenizer.json": json.dumps(described)}, None)
    assert other.encode(TEXT) == own.encode(TEXT)
    assert other.encode_documents([TEXT, "a"]).tolist() == own.encode_documents([TEXT, "a"]).tolist()
    assert other.sha256 == own.sha256


def test_the_older_files(own: ModelTokenizer, files: dict[str, str], tmp_path: Path) -> None:
    """vocab.json and merges.txt, with the special and added tokens of the files beside them."""
    model = json.loads(files["tokenizer.json"])["model"]
    older = {
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": "#version: 0.2\r\n" + "".join(f"{a} {b}\r\n" for a, b in model["merges"]),
        "special_tokens_map.json": json.dumps(
            {"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|user|>", "<x>"]}
        ),
        "added_tokens.json": '{"<x>": 300}',
    }
    tokenizer = of_folder(write_files(tmp_path, older))
    assert (tokenizer.vocab_size, tokenizer.eot) == (301, 0)
    assert tokenizer.encode(TEXT) == own.encode(TEXT)
    assert tokenizer.encode(TEXT, True) == own.encode(TEXT, True)
    assert tokenizer.encode("a<x>", True)[-1] == 300
    assert tokenizer.files() == older
    prefixed = older | {"tokenizer_config.json": '{"add_prefix_space": true, "eos_token": "</s>"}'}
    assert from_files("own", prefixed, None).encode("a b") == own.encode(" a b")


# Whose a folder's is


def test_gpt2s_in_every_form(tmp_path: Path) -> None:
    """It stays the one through tiktoken, and keeps the files as they were."""
    ours = gpt2().files()
    described = json.loads(ours["tokenizer.json"])
    described["added_tokens"][0]["normalized"] = True
    described["model"] = {
        "type": "BPE",
        "vocab": described["model"]["vocab"],
        "merges": ours["merges.txt"].split("\n")[1:-1],
    }
    for name, files in (
        ("older", {"vocab.json": ours["vocab.json"], "merges.txt": ours["merges.txt"]}),
        ("hub", {"tokenizer.json": json.dumps(described), "tokenizer_config.json": '{"model_max_length": 1024}'}),
    ):
        found = of_folder(write_files(tmp_path / name, files | {"config.json": json.dumps(GPT2S)}))
        assert isinstance(found, GPT2Tokenizer)
        assert found.files() == ours | files
        assert found.sha256 == found.special_sha256 == RANKS_SHA256


def test_what_is_not_gpt2s() -> None:
    files = gpt2().files()
    described = describe("gpt2", files)
    assert is_gpt2(described)
    assert not is_gpt2_text(describe("gpt2", files | {"tokenizer_config.json": '{"add_prefix_space": true}'}))
    token = described["added_tokens"][0]
    for special in (True, False):
        more = described | {"added_tokens": [token, token | {"id": 50257, "content": "<x>", "special": special}]}
        assert (is_gpt2(more), is_gpt2_text(more)) == (False, special)
    assert not is_gpt2(described | {"added_tokens": [token | {"lstrip": True}]})
    assert not is_gpt2(described | {"normalizer": {"type": "Lowercase"}})
    assert not is_gpt2(described | {"pre_tokenizer": described["pre_tokenizer"] | {"use_regex": False}})
    merges = list(described["model"]["merges"])
    merges[7:9] = merges[8:6:-1]
    assert not is_gpt2(described | {"model": described["model"] | {"merges": merges}})


def test_equal_hashes_mean_equal_tokens(own: ModelTokenizer, files: dict[str, str]) -> None:
    def hashes(**changes: Any) -> tuple[str, str]:
        made = from_files("own", files | {"tokenizer.json": changed(files["tokenizer.json"], **changes)}, None)
        return made.sha256, made.special_sha256

    described = json.loads(files["tokenizer.json"])
    assert hashes(decoder=None, version="1.0") == (own.sha256, own.special_sha256)
    token = described["added_tokens"][1] | {"id": 300, "content": "<x>"}
    more = hashes(added_tokens=[*described["added_tokens"], token])
    assert more[0] == own.sha256
    ordinary = hashes(added_tokens=[*described["added_tokens"], token | {"special": False}])
    merges = deepcopy(described["model"])
    merges["merges"][0], merges["merges"][1] = merges["merges"][1], merges["merges"][0]
    lower = hashes(normalizer={"type": "Lowercase"})
    all_of_them = {
        own.sha256,
        own.special_sha256,
        more[1],
        ordinary[0],
        hashes(model=merges)[0],
        lower[0],
        RANKS_SHA256,
    }
    assert len(all_of_them) == 7
    ends_otherwise = files | {"tokenizer_config.json": '{"eos_token": "<|user|>"}'}
    assert from_files("own", ends_otherwise, None).sha256 not in all_of_them


@pytest.mark.parametrize(
    ("settings", "number", "expected"),
    [
        ({"eos_token": "<|user|>"}, 0, 1),  # by its name, whatever config.json says
        ({"eos_token": {"content": "</s>"}}, None, 0),
        ({}, 1, 1),
        ({}, [1, 0], 1),
        ({"eos_token": "<nowhere>"}, 0, 0),
        ({}, 299, None),  # what text gives too
        ({}, 50256, None),
        ({}, "1", None),
    ],
)
def test_what_ends_a_text(settings: dict[str, Any], number: Any, expected: int | None, files: dict[str, str]) -> None:
    given = {"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": json.dumps(settings)}
    if expected is None:
        with pytest.raises(InputError, match=r"names no token that ends a text; give tokenizer_config\.json there"):
            from_files("own", given, number)
        spelled = json.loads(given["tokenizer.json"])
        spelled["added_tokens"].append(spelled["added_tokens"][1] | {"id": 300, "content": "<|endoftext|>"})
        assert from_files("own", given | {"tokenizer.json": json.dumps(spelled)}, number).eot == 300
    else:
        assert from_files("own", given, number).eot == expected


@pytest.mark.parametrize(("rows", "taken"), [(50256, False), (50257, True), (50304, True), (50305, False)])
def test_a_model_without_a_tokenizer(
    rows: int, taken: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's, where the vocabulary has its size or the one to which it is padded."""
    write_files(tmp_path, {"config.json": json.dumps(GPT2S | {"vocab_size": rows})})
    if taken:
        assert of_folder(tmp_path).sha256 == RANKS_SHA256
        assert capsys.readouterr().err.startswith(f"note: {tmp_path} has no tokenizer; GPT-2's is taken")
    else:
        with pytest.raises(InputError, match=rf"has no tokenizer .*vocabulary of {rows}, so it is not GPT-2's either"):
            of_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'},
            "is code that comes with the model",
        ),
        (
            {"tokenizer.json": None, "spiece.model": ""},
            "as spiece.model, which is not read here; write it as tokenizer.json",
        ),
        ({"tokenizer.json": None, "vocab.txt": ""}, "as vocab.txt, which is not read here"),
        ({"tokenizer.json": None, "vocab.json": "{}"}, "is a PreTrainedTokenizerFast without tokenizer.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{}", "vocab.json": "{}"}, "vocab.json but not merges.txt"),
        ({"tokenizer.json": '{"model": '}, "tokenizer.json is damaged"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "are damaged"),
        ({"tokenizer.json": '{"model": []}'}, "are damaged"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is damaged"),
        ({"tokenizer_config.json": '{"eos_token": 5}'}, "are damaged"),
        ({"special_tokens_map.json": '{"eos_token": true}', "tokenizer_config.json": "{}"}, "names no token that ends"),
        (
            {
                "tokenizer.json": '{"model": {"type": "BPE", "vocab": {"'
                + "x" * 5000
                + '": 1, "</s>": 1}, "merges": []}}'
            },
            "same",
        ),
        (
            {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}, "merges": ["' + "x" * 5000 + ' y"]}}'},
            "are damaged",
        ),
        ({"added_tokens.json": '{"<x>": 900}'}, "disagree on the token '<x>'"),
        (
            {"config.json": '{"vocab_size": 299}'},
            "the model has 299 tokens, the tokenizer 300; put the tokenizer there",
        ),
        ({"config.json": "{"}, "config.json is damaged"),
    ],
)
def test_what_is_refused(change: dict[str, str | None], words: str, files: dict[str, str], tmp_path: Path) -> None:
    given = {"config.json": '{"vocab_size": 300}', **files, **change}
    write_files(tmp_path, {name: text for name, text in given.items() if text is not None})
    with pytest.raises(InputError, match=words) as refusal:
        of_folder(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert len(str(refusal.value)) < 800


def test_tokens_that_shards_cannot_hold(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 + np.iinfo(np.uint16).max == model_tokenizer.LARGEST_VOCAB
    monkeypatch.setattr(model_tokenizer, "LARGEST_VOCAB", 300)
    assert from_files("own", files, None).vocab_size == 300
    monkeypatch.setattr(model_tokenizer, "LARGEST_VOCAB", 299)
    with pytest.raises(InputError, match=r"its tokenizer has 300 tokens, more than the 299 that 16 bits"):
        from_files("own", files, None)


def test_bytes_that_it_drops(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_folder(write_files(tmp_path / "all", files))
    assert capsys.readouterr().err == ""
    described = json.loads(files["tokenizer.json"])
    del described["model"]["vocab"]["~"]
    of_folder(write_files(tmp_path / "few", files | {"tokenizer.json": json.dumps(described)}))
    assert "few has no token for 1 of the 243 bytes of UTF-8: it drops them" in capsys.readouterr().err


# What is prepared with it


@pytest.fixture(scope="module")
def made(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's tokenizer in `own`, and text prepared with it in `plain` and `special`."""
    folder = tmp_path_factory.mktemp("made")
    write_files(folder / "own", files)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} <|user|> {TEXT}"}) + "\n" for i in range(30)))
    (folder / "plain.partial").mkdir()  # that a power cut left behind, with the tokenizer written already
    (folder / "plain.partial" / "tokenizer.json").touch()
    for name, options in (("plain", ()), ("special", ("--special-tokens",))):
        words = ("text.jsonl", "--out", name, "--tokenizer", folder / "own", "--valid", 0.3, *options)
        assert call(prepare.main, *words, cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("special", [False, True])
def test_a_prepared_folder(special: bool, made: Path, own: ModelTokenizer, files: dict[str, str]) -> None:
    folder = made / ("special" if special else "plain")
    verify_folder(folder)
    meta = read_meta(folder)
    assert meta["tokenizer"] == (own.special_sha256 if special else own.sha256)
    assert meta["vocabulary"] == {"name": str(made / "own"), "size": 300, "eot": 0}
    tokens = np.concatenate([np.concatenate(open_split(folder, split)) for split in ("train", "valid")])
    assert np.count_nonzero(tokens == 0) == 30 * (1 + special)
    assert np.count_nonzero(tokens == 1) == 30 * 2 * special
    for path in folder.glob("*.bin"):
        assert struct.unpack_from("<I", path.read_bytes(), 12) == (300,)
    assert {name: (folder / name).read_text(encoding="utf-8") for name in files} == files
    found = tokenizer_of(folder)
    assert (found.sha256, found.eot, found.vocab_size) == (own.sha256, 0, 300)
    assert shards.made_with(meta, found)
    assert not shards.made_with(meta, gpt2())


def test_of_gpt2s_nothing_more_is_said(tmp_path: Path) -> None:
    write_stories(tmp_path / "a.txt")
    assert call(prepare.main, "a.txt", "--out", "plain", cwd=tmp_path).code == 0
    assert read_meta(tmp_path / "plain").keys() == {"version", "tokenizer", "checksum", "splits", "given"}
    assert {path.suffix for path in (tmp_path / "plain").iterdir()} == {".bin", ".json"}
    assert isinstance(tokenizer_of(tmp_path / "plain"), GPT2Tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "own", "size": 300, "eot": 1}, "is not the one that its tokens were made with"),
        ({"name": "own", "size": 301, "eot": 0}, "has a vocabulary of 300, the tokenizer one of 301"),
        ({"name": "own", "size": 300, "eot": 300}, "meta.json is damaged"),
        ({"name": "own", "size": "300", "eot": 0}, "meta.json is damaged"),
        ({"size": 300, "eot": 0}, "meta.json is damaged"),
        (None, "is not the one that its tokens were made with"),
    ],
)
def test_a_prepared_folder_of_another_tokenizer(
    change: dict[str, Any] | None, words: str, made: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    folder = write_files(tmp_path / "copy", {})
    for path in (made / "plain").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if change:
        (folder / "meta.json").write_text(changed((folder / "meta.json").read_text(), vocabulary=change))
    else:
        described = json.loads(files["tokenizer.json"])
        described["model"]["merges"].pop()
        (folder / "tokenizer.json").write_text(json.dumps(described))

    def used() -> None:
        open_split(folder, "train")
        tokenizer_of(folder)

    with pytest.raises(InputError, match=words):
        used()


def test_a_tokenizer_is_part_of_what_is_prepared(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same text for two models is prepared for each, and once."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path / "a.txt")
    own, ours = of_folder(made / "own"), gpt2()
    folders = [prepare.prepared("a.txt", tokenizer=tokenizer) for tokenizer in (ours, own, ours, own)]
    assert folders[:2] == folders[2:]
    assert [shards.made_with(read_meta(folder), own) for folder in folders[:2]] == [False, True]


def test_refusals_of_the_command(tmp_path: Path) -> None:
    write_stories(tmp_path / "a.txt")
    words = ("a.txt", "--out", "out", "--tokenizer")
    refused(call(prepare.main, *words, "./nowhere", cwd=tmp_path), "there is no folder ./nowhere")
    refused(call(prepare.main, *words, ".", cwd=tmp_path), "has no tokenizer", "and no config.json")
    assert not (tmp_path / "out").exists()
