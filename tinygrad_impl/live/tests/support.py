"""What the tests of the live page share."""

from typing import Any

from data.text.sampling import SAMPLING
from tinygrad_impl.live.settings import Asked, fields


def form(**changes: str) -> dict[str, str]:
    """A form as the page sends it."""
    return fields("Once upon", SAMPLING, False) | changes


def asked(prompt: str = "Once upon", **changes: Any) -> Asked:
    return Asked(prompt, SAMPLING | changes, False)
