"""A process that others ask: a request is a line on stdin, its answer a line on stdout, JSON objects both."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from data.cli import OUT_OF_MEMORY


def answer(do: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Answers every request with what `do` returns of its "do" and of the rest of it, or with {"error": what went
    wrong}, until stdin ends. Whatever else is printed goes to stderr.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing may come between the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = do(request.pop("do"), request)
        except Exception as e:  # of whatever kind, the asker has to hear of it
            cause = getattr(e, "inner_exception", e)  # what torch.compile failed of
            short = f"{type(cause).__name__}: {str(cause).strip()}".partition("\n")[0]
            exhausted = isinstance(cause, MemoryError) or OUT_OF_MEMORY.search(str(cause))
            reply = {"error": "out of memory" if exhausted else short}
        print(json.dumps(reply), file=replies, flush=True)
