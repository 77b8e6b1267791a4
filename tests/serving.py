"""A server for tests: on a free port of this machine, in a thread of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from tokendance import LLM
from tokendance.server.app import create_app
from tokendance.server.background import served
from tokendance.server.context import ServerContext
from tokendance.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "hello there"}]


@contextmanager
def listening(llm: LLM, **settings: Any) -> Iterator[tuple[int, ServerContext, uvicorn.Server]]:
    """Serve a model, as `tiny` unless told otherwise: the port, the server, and what runs it."""
    app = create_app(llm, ServerSettings(**{"port": 0, "served_name": "tiny", **settings}))
    with served(app) as (port, runner):
        yield port, app.state.context, runner


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[tuple[httpx.Client, ServerContext]]:
    """Serve a model, with a client that knows where."""
    with (
        listening(llm, **settings) as (port, server, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client, server


def chat(client: httpx.Client, messages: Any = HELLO, **fields: Any) -> httpx.Response:
    """Ask for a short and certain answer."""
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    return client.post("/v1/chat/completions", json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The documents of a stream that has come to its end."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
