"""A server for tests: on a free port of this machine, in a thread of its own."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import uvicorn

from tokendance import LLM
from tokendance.server.app import create_app
from tokendance.server.background import served
from tokendance.server.context import ServerContext
from tokendance.server.dispatcher import Dispatcher
from tokendance.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "hello there"}]

# Of each server, woken whenever something may have changed in it.
_changes: WeakKeyDictionary[ServerContext, threading.Condition] = WeakKeyDictionary()


@contextmanager
def listening(llm: LLM, **settings: Any) -> Iterator[tuple[int, ServerContext, uvicorn.Server]]:
    """Serve a model, as `tiny` unless told otherwise: the port, the server, and what runs it."""
    app = create_app(llm, ServerSettings(**{"port": 0, "served_name": "tiny", **settings}))
    server: ServerContext = app.state.context
    changed = _changes[server] = threading.Condition()
    _notify(changed, server.engine_thread, "_put")
    _notify(changed, server.engine_thread._dispatcher, "tick")
    with served(app) as (port, runner):
        _notify(changed, runner, "on_tick")  # ten times a second, for what has no event
        yield port, server, runner


def _notify(changed: threading.Condition, owner: object, name: str) -> None:
    """Have a method wake those who wait in `wait_until`."""
    method = getattr(owner, name)

    def notify(*arguments: Any) -> Any:
        result = method(*arguments)
        with changed:
            changed.notify_all()
        return result

    setattr(owner, name, notify)


def comes_true(server: ServerContext, condition: Callable[[], object]) -> bool:
    """Wait for something, which is looked at whenever a server has done a thing; a minute at most.

    Returns:
        Whether it is so.
    """
    changed = _changes[server]
    with changed:
        return bool(changed.wait_for(condition, 60))


def wait_until(server: ServerContext, condition: Callable[[], object]) -> None:
    """Wait for what is sure to come; see `comes_true`."""
    assert comes_true(server, condition)


@contextmanager
def held(server: ServerContext) -> Iterator[None]:
    """Keep the engine's thread from doing anything meanwhile; then it takes all that has come."""
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        assert may_go_on.wait(60)

    server.engine_thread._put(hold)
    assert is_held.wait(60)
    try:
        yield
    finally:
        may_go_on.set()


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


@contextmanager
def asking(
    client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any
) -> Iterator[HTTPConnection]:
    """Ask, and go away at the end of the context, whatever has come until then."""
    with closing(HTTPConnection("127.0.0.1", client.base_url.port, timeout=60)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps({"model": "tiny", **fields}), headers)
        yield connection


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The documents of a stream that has come to its end."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def held_by(dispatcher: Dispatcher) -> dict[str, int]:
    """What a dispatcher holds; nothing when all are answered."""
    arrivals = dispatcher.arrivals
    return {
        "jobs": len(dispatcher._live),
        "named rounds": arrivals.num_named,
        "jobs in the window": 0 if arrivals.window.due_s() is None else 1,
        "announced requests": arrivals.window.num_expected,
    }
