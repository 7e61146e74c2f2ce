from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.cli import InputError
from data.text import tokenizer as module
from data.text.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, read_encoding, tokenizer


def test_known_tokens() -> None:
    assert tokenizer().encode_ordinary("Hello world, it's 2024!\n\n") == [15496, 995, 11, 340, 338, 48609, 0, 628]
    assert tokenizer().n_vocab == VOCAB_SIZE == 50257
    assert (EOT, EOT_TEXT) == (50256, "<|endoftext|>")
    assert tokenizer().encode_ordinary("!") == [0]
    assert tokenizer().decode([50255]) == " gazed"


@pytest.mark.parametrize("text", ["", "naïve café 🐻 日本語", "  \t two  spaces\r\n", f"a {EOT_TEXT} b", "\0\x7f"])
def test_decode_inverts_encode(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode_ordinary(text)) == text


def test_end_of_text_only_on_request() -> None:
    assert EOT not in tokenizer().encode_ordinary(EOT_TEXT)
    assert tokenizer().encode(EOT_TEXT, allowed_special={EOT_TEXT}) == [EOT]


@pytest.mark.parametrize(("content", "fault"), [(None, "missing"), (b"IQ== 0\n", "damaged")])
def test_bad_rank_file(content: bytes | None, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANKS", tmp_path / "ranks")
    if content:
        (tmp_path / "ranks").write_bytes(content)
    with pytest.raises(InputError, match=rf"rank file {tmp_path}/ranks is {fault}.*; check out the project again$"):
        read_encoding()


def test_every_thread_has_its_own() -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(tokenizer).result()
        assert other is pool.submit(tokenizer).result()
    assert other is not tokenizer()
    assert tokenizer() is tokenizer()
