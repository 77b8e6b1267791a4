"""The clients in `frameworks/`, each run as its users run it, in an environment of their own."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from oracle import Asked, reusable

CLIENTS = Path(__file__).parent / "frameworks"
PYTHON = CLIENTS.parents[1] / ".venv-frameworks" / "bin" / "python"


def run_client(url: str, client: str, way: str, agents: int, rounds: int) -> list[dict[str, str]]:
    """Let a client play its town; return what was said in each round, by name."""
    output = run(CLIENTS / f"{client}.py", url, str(agents), str(rounds), way)
    said: list[dict[str, str]] = json.loads(output.splitlines()[-1])
    return said


def run(script: Path, *arguments: str) -> str:
    """Run a client; return what it has written."""
    ended = subprocess.run(
        [PYTHON, script, *arguments],
        # Nothing but the URL leads to the server.
        env={name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def count_tokens(asked: Sequence[Sequence[Asked]]) -> tuple[list[int], list[int], list[int]]:
    """Of each round the tokens of prompts that were reused, those that could be, and all."""
    reused = [sum(request.reused for request in one_round) for one_round in asked]
    prompts = [sum(len(request.prompt) for request in one_round) for one_round in asked]
    return reused, reusable(asked), prompts
