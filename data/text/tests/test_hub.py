"""Datasets of the hub, of which there is an imitation on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from huggingface_hub import constants

from data.cli import InputError
from data.testing import call
from data.text import hub, prepare
from data.text.hub import HubError
from data.text.shards import open_split
from data.text.sources import Stream, stream
from data.text.tests.test_records import parquet_of
from data.text.tests.test_sources import checked
from data.text.tokenizer import tokenizer


class Hub:
    """Datasets by name, their files by revision ("main" and others), and their cards; and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.sent: list[str] = []
        self.gone = False  # answers no more

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main", **card: Any) -> None:
        self.files.setdefault(repo, {})[revision] = files
        self.cards[repo] = card

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        kind, _, rest = unquote(path).partition("?")[0].lstrip("/").partition("datasets/")
        repo, rest = "/".join(rest.split("/")[:2]), rest.split("/", 2)[-1]
        if self.gone:
            return 503, b"", {}
        if repo not in self.files:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if kind == "api/":
            revision = rest.removeprefix("revision/") if rest.startswith("revision/") else "main"
            if revision not in self.files[repo]:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            files = self.files[repo][revision]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            info = {"id": repo, "sha": sha(revision), "siblings": siblings, "cardData": self.cards[repo]}
            return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        commit, name = rest.removeprefix("resolve/").split("/", 1)
        [content] = [files[name] for revision, files in self.files[repo].items() if sha(revision) == commit]
        return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}


def sha(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            code, content, headers = found.answer(self.path)
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if "/resolve/" in self.path and code == 200:  # before it: whoever has the content may look at once
                    found.sent.append(unquote(self.path).split("/", 6)[-1])
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 2)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._REGISTRY_FETCH_TIMEOUT", 0.2)
    yield found
    server.shutdown()
    server.server_close()


def read(source: str, split: str) -> list[str] | None:
    text = stream(source, split)
    return checked(text) if text else None


def test_files_are_fetched_as_they_are_read(there: Hub) -> None:
    there.add(
        "some/stories",
        {
            "README.md": b"# Stories",
            "data/train-00000-of-00002.parquet": parquet_of(["one", "two"]),
            "data/train-00001-of-00002.parquet": parquet_of(["three"]),
            "data/validation-00000-of-00001.parquet": parquet_of(["four"]),
            "data/test-00000-of-00001.parquet": parquet_of(["five"]),
            "stories-train.txt": b"the same again",
        },
    )
    text = stream("some/stories", "train")
    assert isinstance(text, Stream)
    assert there.sent == []
    assert text.size == sum(
        len(there.files["some/stories"]["main"][f"data/train-0000{i}-of-00002.parquet"]) for i in (0, 1)
    )
    chunks = text.chunks()
    assert [piece.text for piece in next(chunks).pieces] == ["one", "two"]
    assert there.sent == ["data/train-00000-of-00002.parquet"]
    assert checked(text) == ["one", "two", "three"]
    assert len(there.sent) == 2  # each once
    assert read("some/stories", "valid") == ["four"]


@pytest.mark.parametrize(
    ("files", "train", "valid"),
    [
        ({"a.jsonl": b'{"text": "a"}', "b.jsonl": b'{"text": "b"}', "dataset_infos.json": b"{}"}, ["a", "b"], None),
        ({"train.csv.gz": b"", "val.csv.gz": b"", "x.csv.gz": b"text\nx"}, None, None),
        ({"My-Train.txt": b"a", "dev/b.txt": b"b", "training-notes.md": b"c"}, ["a"], ["b"]),
        ({"test.txt": b"a", "rest.txt": b"b"}, ["b", "a"], None),
        ({"train.txt": b"a", "more.txt": b"b"}, ["b", "a"], None),
    ],
)
def test_the_split_is_in_the_names(
    files: dict[str, bytes], train: list[str] | None, valid: list[str] | None, there: Hub
) -> None:
    there.add("a/b", files)
    if train is None:
        for split, name in (("train", "train.csv.gz"), ("valid", "val.csv.gz")):
            found, left_out = hub.dataset_files("a/b", split)
            assert [file.name for file in found] == [name]
            assert left_out == ["x.csv.gz"]
        text = stream("a/b", "train")
        assert text
        assert text.notes == ("left out of a/b, as their names say no split and those of others do: x.csv.gz",)
    else:
        assert (read("a/b", "train"), read("a/b", "valid")) == (train, valid)


def test_the_card_says_which_files_are_what(there: Hub) -> None:
    files = {
        f"{part}/{i}.jsonl": json.dumps({"text": f"{part} {i}"}).encode() for part in ("en", "it/x") for i in (1, 2)
    }
    configs: list[dict[str, Any]] = [
        {
            "config_name": "english",
            "data_files": [{"split": "train", "path": "en/1*"}, {"split": "test", "path": "en/2*"}],
        },
        {"config_name": "all", "data_files": "**/*.jsonl", "default": True},
        {"config_name": "top", "data_files": ["*/1.jsonl"]},
        {"config_name": "italian", "data_dir": "it", "data_files": [{"split": "it", "path": ["x"]}]},
        {"config_name": "empty", "data_files": "none/*"},
    ]
    there.add("a/b", files, configs=configs)
    assert read("a/b:english", "train") == ["en 1"]
    assert read("a/b:english", "valid") is None
    assert read("a/b:all", "train") == ["en 1", "en 2", "it/x 1", "it/x 2"]
    assert read("a/b:top", "train") == ["en 1"]
    assert read("a/b:italian", "train") == ["it/x 1", "it/x 2"]
    with pytest.raises(
        InputError, match=r"a/b has several configurations; choose one of a/b:english, a/b:all, a/b:top, a/b:italian$"
    ):
        stream("a/b", "train")
    with pytest.raises(InputError, match="has no configuration empty; choose one of a/b:english"):
        stream("a/b:empty", "train")


def test_the_hubs_own_copy_is_taken_where_nothing_else_can_be_read(there: Hub) -> None:
    there.add("a/b", {"b.py": b"", "a.zip": b""})
    with pytest.raises(InputError, match=r"the dataset a/b has no training text in a format that can be read"):
        stream("a/b", "train")
    there.add(
        "a/b",
        {f"default/{split}/0000.parquet": parquet_of([split]) for split in ("train", "validation")},
        hub.CONVERTED,
    )
    assert (read("a/b", "train"), read("a/b", "valid")) == (["train"], ["validation"])
    there.files["a/b"][hub.CONVERTED]["other/train/0000.parquet"] = parquet_of(["other"])
    with pytest.raises(InputError, match="choose one of a/b:default, a/b:other"):
        stream("a/b", "train")
    assert read("a/b:other", "train") == ["other"]


def test_what_is_not_there(there: Hub) -> None:
    with pytest.raises(
        InputError,
        match="no/body, which is no file or folder here, is no public dataset of the Hugging Face hub either",
    ):
        stream("no/body", "train")
    there.gone = True
    with pytest.raises(
        HubError,
        match=r"hub cannot be reached for no/body, which is no file or folder here, \(.*\); try again, or pass a local",
    ):
        stream("no/body", "train")


def test_a_broken_connection_loses_nothing(there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preparation goes on where it was, and the folder is what it would have been."""
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(prepare, "BATCH", 1)
    texts = [f"Text {i} of some words." for i in range(40)]
    there.add(
        "a/b",
        {f"train-{i}.jsonl": "".join(json.dumps({"story": t}) + "\n" for t in texts[i::4]).encode() for i in range(4)},
    )
    answer, options = there.answer, ["a/b", "--valid", "0.2", "--field", "story", "--workers", "1"]

    def breaking(path: str) -> tuple[int, bytes, dict[str, str]]:
        there.gone = "train-3" in path
        return answer(path)

    monkeypatch.setattr(there, "answer", breaking)
    broken = call(prepare.main, *options, "--out", "out", cwd=tmp_path)
    assert (broken.code, broken.err.count("the same command goes on from")) == (2, 1), broken
    there.gone = False
    monkeypatch.setattr(there, "answer", answer)
    again = call(prepare.main, *options, "--out", "out", cwd=tmp_path)
    assert again.code == 0, again
    assert "going on from" in again.err
    assert call(prepare.main, *options, "--out", "whole", cwd=tmp_path).code == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    tokens = [np.concatenate(open_split(tmp_path / "out", split)).tolist() for split in ("train", "valid")]
    found = [text for split in tokens for text in tokenizer().decode(split).split("<|endoftext|>")[:-1]]
    assert sorted(found) == sorted(texts)
