"""What a visitor asks for: the fields of the form, read and checked."""

import json

import pytest

from data.text.sampling import SAMPLING
from tinygrad_impl.live.settings import MOST_BYTES, MOST_CHARACTERS, Refused, fields, read
from tinygrad_impl.live.tests.support import asked, form


def errors(body: object) -> dict[str, str]:
    with pytest.raises(Refused) as refused:
        read(body if isinstance(body, bytes) else json.dumps(body).encode())
    return refused.value.errors


@pytest.mark.parametrize("special", [False, True])
def test_a_form_is_read_as_it_was_filled(special: bool) -> None:
    settings = {"temperature": 0.1 + 0.2, "top_k": 7, "top_p": 0.95, "seed": 10**18 - 1, "max_new_tokens": 5}
    for given in (settings, SAMPLING):
        found = read(json.dumps(fields("a <b>\n🦙", given, special)).encode())
        assert (found.prompt, found.settings, found.special_tokens) == ("a <b>\n🦙", given, special)
        assert found.sampling().keys() == SAMPLING.keys() - {"max_new_tokens"}


def test_zero_and_nothing_are_all_tokens() -> None:
    for text in ("0", "", " "):
        assert read(json.dumps(form(top_k=text, top_p=" ")).encode()).settings["top_k"] is None
    assert read(json.dumps(form(prompt="")).encode()) == asked("")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("temperature", "hot", "hot is not a number of at least 0."),
        ("temperature", "-1", "-1 is not a number of at least 0."),
        ("temperature", "nan", "nan is not a number of at least 0."),
        ("temperature", "inf", "inf is not a number of at least 0."),
        ("temperature", "1e-320", "Temperature is 1e-320; give 0 (greedy), or a number of at least 1e-09."),
        ("temperature", "1_0", "1_0 is not a number of at least 0."),
        ("temperature", "", "Nothing is given; 0.6 is usual."),
        ("top_k", "2.5", "2.5 is not a whole number of at least 0."),
        ("top_k", "-1", "-1 is not a whole number of at least 0."),
        ("top_p", "0", "0 is not a number above 0 and at most 1."),
        ("top_p", "2", "2 is not a number above 0 and at most 1."),
        ("seed", "-1", "-1 is not a whole number of at least 0."),
        ("seed", " ", "Nothing is given; 1337 is usual."),
        ("seed", "9" * 19, f"{'9' * 19} is not a whole number of at least 0."),
        ("seed", "9" * 41, "This is too long for a number; give fewer digits."),
        ("max_new_tokens", "0", "0 is not a whole number of at least 1."),
        ("max_new_tokens", "2001", "2001 is more than this page writes; give at most 2,000."),
        ("max_new_tokens", "", "Nothing is given; 160 is usual."),
        ("prompt", "x" * (MOST_CHARACTERS + 1), "The prompt has 20,001 characters; give at most 20,000."),
        ("prompt", "a\ud83e", "The prompt has half a character in it, which no text can have; type it again."),
        ("special_tokens", "yes", "A link has special_tokens=1, or leaves it out."),
    ],
)
def test_a_bad_value_is_said_of_its_field(name: str, text: str, said: str) -> None:
    assert errors(form(**{name: text})) == {name: said}


def test_all_bad_values_are_said_at_once() -> None:
    assert errors(form(temperature="hot", seed="", top_p="7")).keys() == {"temperature", "seed", "top_p"}


def test_the_longest_prompt_is_read_however_it_is_written() -> None:
    prompt = "🦙" * MOST_CHARACTERS
    body = json.dumps(form(prompt=prompt)).encode()  # 12 bytes a character
    assert read(body).prompt == prompt
    assert errors(b" " * (MOST_BYTES + 1)).keys() == {"prompt"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"3", b'{"prompt": "a"}', b'{"prompt": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_form(body: bytes) -> None:
    assert errors(body) == {"": "The request is not one of this page's; reload the page."}
    assert errors(form() | {"seed": 3}) == errors(body)
