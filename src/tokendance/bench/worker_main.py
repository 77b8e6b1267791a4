"""Has an engine answer requests, one JSON object a line, in the engine's own environment.

    python -P worker_main.py vllm_engine.py < requests > replies

It is run as a script, by a Python that does not know this package, so it imports nothing of ours,
nor does the script that it is given: that has a function `start(request)`, which is given the first
request and returns the engine and the reply, and the engine has `answer(request)` for all others.
What goes wrong is replied as {"error": "..."}, with the traceback on stderr, and ends the process
with status 1. The end of stdin ends it too.
"""

import importlib.util
import json
import os
import sys
import traceback
from typing import IO, Any


def main(script: str) -> int:
    """Answer requests until the end of stdin, and return the exit status."""
    engine: Any = None
    with _take_stdout() as replies:
        try:
            start = _load(script).start
            for line in sys.stdin:
                request = json.loads(line)
                if request["op"] == "start":
                    engine, reply = start(request)
                else:
                    assert engine is not None, "no start"
                    reply = engine.answer(request)
                _send(replies, reply)
        except Exception as error:
            traceback.print_exc()
            _send(replies, {"error": f"{type(error).__name__}: {error}"})
            return 1
    return 0


def _load(script: str) -> Any:
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location("engine", script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["engine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _take_stdout() -> IO[str]:
    """Keep stdout for replies; whatever else prints there goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
