"""The dashboard of a server: what it shows to whom, and that it follows what happens."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from serving import listening
from tokendance import LLM
from tokendance.view.document import Json
from tokendance.view.page import POLICY

MakeLLM = Callable[..., LLM]
PARTS = ("/dashboard", "/dashboard/events", "/dashboard/view.js", "/dashboard/view.css")


def basic(key: str) -> dict[str, str]:
    """What a browser sends when its user has typed a key."""
    return {"authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


@contextmanager
def asked(
    port: int, path: str, headers: dict[str, str] | None = None, body: Any = None
) -> Iterator[HTTPResponse]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    text = None if body is None else json.dumps(body)
    given = {"content-type": "application/json", **(headers or {})}
    connection.request("GET" if body is None else "POST", path, text, given)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def a_round(port: int, word: str, headers: dict[str, str] | None = None) -> Json:
    """Have three agents answer, each of whom reads the same."""
    agents = [
        {
            "agent": name,
            "max_tokens": 6,
            "messages": [
                {"role": "system", "content": f"You are {name}."},
                {"role": "user", "content": f"{word} is what all of them hear, again and again."},
            ],
        }
        for name in ("Ann", "Bo", "Cy Longname")
    ]
    body = {"model": "tiny", "agents": agents}
    with asked(port, "/v1/rounds", headers, body) as answer:
        document: Json = json.loads(answer.read())
        assert answer.status == 200, document
        return document


def events(answer: HTTPResponse) -> Iterator[Json]:
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def first_done(stream: Iterator[Json]) -> Json:
    """The first event after which a round is done."""
    return next(
        event for event in stream if event["rounds"] and event["rounds"][-1]["stop_s"] is not None
    )


def test_rounds_are_seen_while_they_happen(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm()) as (port, _, _), asked(port, "/dashboard/events") as answer:
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        stream = events(answer)
        assert next(stream)["rounds"] == []
        told = a_round(port, "Potato")
        event = first_done(stream)
        assert [agent["agent"] for agent in event["rounds"][-1]["agents"]] == [
            "Ann", "Bo", "Cy Longname",
        ]  # fmt: skip
        tokens = [agent["usage"]["prompt_tokens"] for agent in told["agents"]]
        assert [agent["prompt"] for agent in event["rounds"][-1]["agents"]] == tokens
        assert event["rounds"][-1]["memory"]["stored"]["memory"] > 0
        assert not event["has_text"]
        assert "Potato" not in json.dumps(event)
        assert told["agents"][0]["message"]["content"] not in json.dumps(event)


def test_text_is_shown_where_it_is_allowed(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm(), dashboard_text=True) as (port, _, _):
        a_round(port, "Potato")
        with asked(port, "/dashboard/events") as answer:
            assert "Potato" in json.dumps(first_done(events(answer)))


def test_the_page_is_served_with_a_strict_policy(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm()) as (port, _, _):
        for path in PARTS:
            with asked(port, path) as answer:
                assert answer.status == 200
                assert answer.getheader("content-security-policy") == POLICY
        with asked(port, "/dashboard/../app.py") as answer:
            assert answer.status == 404
    with listening(make_fake_llm(), dashboard=False) as (port, _, _):
        for path in PARTS:
            with asked(port, path) as answer:
                assert answer.status == 404


def test_where_there_are_keys_all_of_it_needs_one(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm(), api_keys=("one", "two")) as (port, _, _):
        bad = base64.b64encode(b"no colon").decode()
        for path in PARTS:
            for headers in ({}, basic("wrong"), {"authorization": f"Basic {bad}"}, basic("")):
                with asked(port, path, headers) as answer:
                    assert answer.status == 401
                    assert answer.getheader("www-authenticate", "").startswith("Basic ")
            for headers in (basic("one"), {"authorization": "Bearer two"}):
                with asked(port, path, headers) as answer:
                    assert answer.status == 200
        # A browser that has such a key sends it by itself, also for other sites' pages.
        with asked(port, "/v1/models", basic("one")) as answer:
            assert answer.status == 401
            assert answer.getheader("www-authenticate") == "Bearer"


def test_a_tenant_sees_its_own_rounds(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm(), api_keys=("one", "two"), dashboard_text=True) as (port, _, _):
        a_round(port, "Potato", {"authorization": "Bearer one"})
        a_round(port, "Turnip", {"authorization": "Bearer two"})
        a_round(port, "Carrot", {"authorization": "Bearer two"})
        seen = {}
        for key, number in (("one", 1), ("two", 2)):
            with asked(port, "/dashboard/events", basic(key)) as answer:
                stream = events(answer)
                seen[key] = next(
                    event
                    for event in stream
                    if event["rounds"] and event["rounds"][-1]["number"] == number
                )
        assert "Potato" in json.dumps(seen["one"])
        assert "Turnip" not in json.dumps(seen["one"])
        assert "Potato" not in json.dumps(seen["two"])
        assert [one["number"] for one in seen["two"]["rounds"]] == [1, 2]
        assert all(run["round"] in (1, 2) for run in seen["two"]["runs"])
        assert seen["two"]["rounds"][0]["memory"]["stored"] is None  # others' is in it


def test_too_many_viewers_are_refused(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendance.server.dashboard._MAX_VIEWERS", 1)
    with listening(make_fake_llm()) as (port, _, _), asked(port, "/dashboard/events") as answer:
        next(events(answer))
        with asked(port, "/dashboard/events") as other:
            assert other.status == 429
            assert "Close one" in other.read().decode()


def test_a_server_that_stops_waits_for_nobody_who_looks_on(make_fake_llm: MakeLLM) -> None:
    with listening(make_fake_llm()) as (port, server, _), asked(port, PARTS[1]) as answer:
        stream = events(answer)
        next(stream)
        server.admission.is_draining = True
        assert list(stream) == []
