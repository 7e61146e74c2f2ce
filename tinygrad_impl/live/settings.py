"""What a visitor asks for: the fields of the page's form, as text, read and checked."""

import json
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any

from data.cli import InputError
from data.text.sampling import SAMPLING, Sampler
from tinygrad_impl.generate import KINDS

FIELDS = ("prompt", *SAMPLING, "special_tokens")  # of the form, and of a link to it
MOST_CHARACTERS = 20_000  # of a prompt
MOST_TOKENS = 2_000  # to write
MOST_BYTES = 1 << 18  # of a request: each character of a prompt may be 12 of them


class Refused(Exception):
    """A request that is not answered. `errors`: a sentence for each field that is wrong; "" is the request itself."""

    def __init__(self, errors: dict[str, str]):
        super().__init__(str(errors))
        self.errors = errors


@dataclass(frozen=True)
class Asked:
    """A request: `settings` has the keys of `SAMPLING`, as `generate` has them."""

    prompt: str
    settings: dict[str, Any]
    special_tokens: bool

    @property
    def max_new_tokens(self) -> int:
        return int(self.settings["max_new_tokens"])

    def sampling(self) -> dict[str, Any]:
        """What `Sampler` takes."""
        return {name: value for name, value in self.settings.items() if name != "max_new_tokens"}


def fields(prompt: str, settings: dict[str, Any], special_tokens: bool) -> dict[str, str]:
    """A form with this in it: `read` gives it back."""
    texts = {name: "" if value is None else str(value) for name, value in settings.items()}
    return {"prompt": prompt, **texts, "special_tokens": "1" if special_tokens else ""}


def read(body: bytes) -> Asked:
    """The request in a JSON object of the form's fields, all of them text. Raises `Refused`."""
    if len(body) > MOST_BYTES:
        raise Refused({"prompt": f"The prompt is too long; give at most {MOST_CHARACTERS:,} characters."})
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(given.get(name), str) for name in FIELDS):
        raise Refused({"": "The request is not one of this page's; reload the page."})
    errors, settings = dict[str, str](), dict[str, Any]()
    if said := wrong_prompt(given["prompt"]):
        errors["prompt"] = said
    for name in SAMPLING:
        try:
            settings[name] = setting(name, given[name].strip())
        except (ArgumentTypeError, InputError) as e:
            said = str(e)
            errors[name] = f"{said if said.startswith(given[name].strip() or '-') else said[0].upper() + said[1:]}."
    if given["special_tokens"] not in ("", "1"):
        errors["special_tokens"] = "A link has special_tokens=1, or leaves it out."
    if errors:
        raise Refused(errors)
    return Asked(given["prompt"], settings, given["special_tokens"] == "1")


def wrong_prompt(prompt: str) -> str:
    """A sentence on what is wrong with a prompt; empty where nothing is."""
    if len(prompt) > MOST_CHARACTERS:
        return f"The prompt has {len(prompt):,} characters; give at most {MOST_CHARACTERS:,}."
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "The prompt has half a character in it, which no text can have; type it again."
    return ""


def setting(name: str, text: str) -> Any:
    """A setting of sampling as it is typed. Raises `ArgumentTypeError` or `InputError`."""
    if not text:
        if name in ("top_k", "top_p"):
            return None
        raise InputError(f"nothing is given; {SAMPLING[name]} is usual")
    if len(text) > 40:
        raise InputError("this is too long for a number; give fewer digits")
    value = KINDS[name](text)
    if name == "max_new_tokens":
        if value > MOST_TOKENS:
            raise InputError(f"{text} is more than this page writes; give at most {MOST_TOKENS:,}")
        return value
    if name == "top_k":
        value = value or None
    Sampler(**{name: value})  # refuses the rest
    return value
