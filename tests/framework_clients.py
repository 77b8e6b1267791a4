"""The clients in `frameworks/`, each run as its users run it, in environments of their own."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from oracle import Asked, reusable
from serving import serving
from tokendance import LLM
from tokendance.engine.request import Request
from tokendance.models import demo
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.server.jobs import Job

CLIENTS = Path(__file__).parent / "frameworks"
PYTHON = CLIENTS.parents[1] / ".venv-frameworks" / "bin" / "python"
# Some clients want version 3 of OpenAI's package, and others cannot have it.
PYTHON_OPENAI_3 = CLIENTS.parents[1] / ".venv-frameworks-openai3" / "bin" / "python"
_WITH_OPENAI_3 = {"litellm_proxy_town", "openai_agents_town", "pydantic_ai_town"}


@dataclass(frozen=True)
class Played:
    """What a client has played.

    Attributes:
        said: in each round, by name.
        asked: in the order of arrival.
        llm: that was asked.
    """

    said: list[dict[str, str]]
    asked: list[Asked]
    llm: LLM


def play(
    model: LoadedModel, client: str, way: str, *, agents: int, rounds: int, shadow: float = 0
) -> Played:
    """Serve a model, and let a client play its town."""
    llm = LLM.from_loaded(model, EngineOptions(kv_budget=2**30, shadow=shadow))
    requests: list[Request] = []
    with serving(llm, served_name=demo.ALIAS) as (http, server), pytest.MonkeyPatch.context() as m:
        submit = server.engine_thread.submit

        def record(jobs: Sequence[Job]) -> None:
            requests.extend(job.request for job in jobs)
            submit(jobs)

        m.setattr(server.engine_thread, "submit", record)
        said = run_client(str(http.base_url).rstrip("/"), client, way, agents, rounds)
    llm.engine.check_integrity()
    asked = [
        Asked(request.prompt.token_ids.tolist(), list(request.generated), request.num_reused)
        for request in requests
    ]
    return Played(said, asked, llm)


def run_client(url: str, client: str, way: str, agents: int, rounds: int) -> list[dict[str, str]]:
    """Let a client play its town; return what was said in each round, by name."""
    output = run(CLIENTS / f"{client}.py", url, str(agents), str(rounds), way)
    said: list[dict[str, str]] = json.loads(output.splitlines()[-1])
    return said


def run(script: Path, *arguments: str) -> str:
    """Run a client; return what it has written."""
    ended = subprocess.run(
        [PYTHON_OPENAI_3 if script.stem in _WITH_OPENAI_3 else PYTHON, script, *arguments],
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
