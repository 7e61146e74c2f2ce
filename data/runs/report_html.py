"""What every page is made of: its frame and style, lists of facts, and tables. A page loads nothing from anywhere."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE, SCRIPT = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


def escaped(value: Any) -> Any:
    """The same with every string in it made safe to stand in HTML."""
    if isinstance(value, dict):
        return {escape(str(k)): escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(v) for v in value]
    return escape(value) if isinstance(value, str) else value


def page(title: str, body: str, data: dict[str, Any] | None = None, style: str = "") -> str:
    """The whole page. Only our own script may run, whatever the files of a stranger's run have brought in."""
    script, policy = "", "'none'"
    if data:
        embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
        script = f'<script type="application/json" id="data">{embedded}</script>\n<script>{SCRIPT}</script>'
        policy = f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src {policy};
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}
</body>
</html>
"""
    return text.encode(errors="replace").decode()  # JSON can hold half a character, which no file could


def breakable(path: str) -> str:
    """A path, a name or a command that breaks between its parts, where a line is too short for it."""
    return re.sub(r"([/_.=])(?=\w)", r"\1<wbr>", path)


def machine(device: str, card: str) -> str:
    """A device and what it calls itself, of which the one often says the other."""
    return card if card.split()[:1] == [device] else f"{device} ({card})"


def spoken(value: Any) -> str:
    """An option's value in words. Strings in it are escaped already."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(spoken, value)) if isinstance(value, list) else str(value)


def command(line: str) -> str:
    """A command to copy, as one line. Where the screen is narrower, it breaks between words."""
    return f"<pre>{' '.join(f'<span>{breakable(word)}</span>' for word in line.split(' '))}</pre>"


def pairs(items: dict[str, str], kind: str = "facts") -> str:
    return f'<dl class="{kind}">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in items.items())}</dl>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table whose first column names the rows. On a narrow screen each row is a block, with the heads in it."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = ""
    for first, *rest in rows:
        lines += f'<tr><th scope="row">{first}</th>'
        for name, cell in zip(heads[1:], rest, strict=True):
            lines += f'<td data-head="{name}"{" class=words" * (len(cell) > 30)}>{cell}</td>'
        lines += "</tr>"
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>
<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"""
