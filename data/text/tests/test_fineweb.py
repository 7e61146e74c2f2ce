"""FineWeb's shards from an imitation of the hub on 127.0.0.1."""

import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from data.cli import InputError
from data.text.fineweb import fineweb, is_fineweb
from data.text.prepare import prepared
from data.text.shards import open_split, read_meta
from data.text.tests.test_token_files import llm_c
from data.text.tokenizer import GPT2Tokenizer

COMMIT = "c0ffee" * 6 + "0000"


class Hub:
    """What it has, and what it was asked."""

    def __init__(self) -> None:
        self.files = {"fineweb_val_000000.bin": llm_c(np.arange(50_000, 49_000, -1))}
        for number in range(1, 4):
            self.files[f"fineweb_train_{number:06d}.bin"] = llm_c(np.arange(9_000) + 1000 * number)
        self.got: list[tuple[str, int]] = []  # the name and the first byte
        self.breaks_off: dict[str, int] = {}  # how often, in the middle of a file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            folder, _, name = self.path.rpartition("/")
            content = hub.files.get(name)
            if content is None or folder not in (
                "/datasets/kjj0/fineweb10B-gpt2/resolve/main",
                f"/datasets/kjj0/fineweb10B-gpt2/resolve/{COMMIT}",
            ):
                self.send_error(404)
                return
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{name}-{len(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                hub.got.append((name, start))
                left = hub.breaks_off[name] = hub.breaks_off.get(name, 0) - 1
                self.wfile.write(content[start : len(content) // 2] if left >= 0 else content[start:])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("source", ["fineweb10B:2", "kjj0/fineweb10B-gpt2:2"])
def test_the_first_shards_are_used_where_they_are(
    source: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(source)
    assert folder == Path("runs/data/fineweb10B-2")
    assert names(folder) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    for path in folder.iterdir():
        assert path.is_symlink()
        assert path.readlink().is_relative_to(tmp_path / "cache")
        assert path.read_bytes() == hub.files[path.name]
    np.testing.assert_array_equal(np.concatenate(open_split(folder, "train"))[8_999:9_001], [9_999, 2_000])
    (said,) = capsys.readouterr().out.splitlines()
    assert said == f"getting {source} from the hub, 3 files of 0.2 GB, 0.6 GB in all, unless its cache has them"
    assert [name for name, _ in hub.got] == ["fineweb_val_000000.bin", *names(folder)[:2]]

    hub.got.clear()
    hub.files.clear()
    assert prepared(source) == folder  # and the hub is not needed again
    assert capsys.readouterr().out == ""


def test_another_tokenizer_is_refused_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sha256", "special_sha256"):
        monkeypatch.setattr(GPT2Tokenizer, name, "of another")
    with pytest.raises(InputError, match=r"fineweb10B:2 holds GPT-2's tokens, and gpt2 has another tokenizer; pass a"):
        prepared("fineweb10B:2")
    assert not hub.got


def test_other_numbers_of_shards_are_other_data(hub: Hub) -> None:
    checksums = {read_meta(fineweb(f"fineweb10B:{number}"))["checksum"] for number in (3, 1, 2, 3)}
    assert len(checksums) == 3
    assert len(hub.got) == 4  # each file once
    assert names(Path("runs/data")) == ["fineweb10B-1", "fineweb10B-2", "fineweb10B-3"]


def test_all_of_it(hub: Hub) -> None:
    for number in range(4, 104):
        hub.files[f"fineweb_train_{number:06d}.bin"] = hub.files["fineweb_train_000001.bin"]
    del hub.files["fineweb_val_000000.bin"]
    with pytest.raises(InputError, match=r"the Hugging Face hub cannot be reached for .*/fineweb_val_000000.bin \("):
        fineweb("fineweb10B")
    assert os.listdir("runs/data") == []


def test_a_broken_download_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a file while this process lasts; the next one begins with the file that is not whole."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, between its tries
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 12)
    val, one, two = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
    hub.breaks_off = {one: 1, two: 99}
    with pytest.raises(InputError, match=f"cannot be reached for kjj0/fineweb10B-gpt2/{two}"):
        fineweb("fineweb10B:2")
    assert [(name, start > 0) for name, start in hub.got[:3]] == [(val, False), (one, False), (one, True)]
    assert names(Path("runs/data")) == []
    hub.got.clear()
    hub.breaks_off.clear()
    folder = fineweb("fineweb10B:2")
    assert hub.got == [(two, 0)]
    assert all((folder / name).read_bytes() == hub.files[name] for name in (val, one, two))


def test_a_cache_that_was_emptied(hub: Hub, tmp_path: Path) -> None:
    """Leaves links to nothing; what they led to is fetched again."""
    folder = fineweb("fineweb10B:1")
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert fineweb("fineweb10B:1") == folder
    assert all(path.read_bytes() == hub.files[path.name] for path in folder.iterdir())


@pytest.mark.parametrize("number", ["0", "104", "-1", "x", "", "1.5", "1000000000000"])
def test_numbers_of_shards_that_there_are_not(number: str) -> None:
    with pytest.raises(InputError, match=r"there are 103 training shards; give 1 to 103, as in `fineweb10B:8`"):
        fineweb(f"fineweb10B:{number}")


def test_what_it_is_called() -> None:
    assert all(map(is_fineweb, ("fineweb10B", "fineweb10B:8", "kjj0/fineweb10B-gpt2", "kjj0/fineweb10B-gpt2:103")))
    assert not any(map(is_fineweb, ("fineweb", "fineweb10B.txt", "fineweb10B-gpt2", "data/fineweb10B", "xfineweb10B")))
