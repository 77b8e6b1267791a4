"""What an answer has to be, whatever was asked."""

import json
from collections.abc import Collection
from typing import Any

from soak.client import Reply


def problem_of(reply: Reply, expected: Collection[int]) -> str | None:
    """What is wrong with an answer, if anything."""
    shown = f"{reply.status} {reply.body[:300]!r}"
    if reply.status not in expected:
        return f"{shown}, where {tuple(expected)} is expected"
    kind = reply.headers.get("content-type", "")
    if reply.status >= 400:
        try:
            document = json.loads(reply.body)
        except ValueError:
            return f"{shown} is no JSON"
        if not is_error(document):
            return f"{shown} is no error in OpenAI's shape"
        if reply.status in (429, 503) and not reply.headers.get("retry-after", "").isdigit():
            return f"{shown} does not say when to come back"
        return None
    if kind.startswith("text/event-stream"):
        return _problem_of_events(reply.body)
    if kind.startswith("application/json"):
        return _problem_of_document(json.loads(reply.body), shown)
    return None


def is_error(document: Any) -> bool:
    """Whether a document is {"error": {message, type, param, code}} as OpenAI's clients know it."""
    if not isinstance(document, dict) or not isinstance(document.get("error"), dict):
        return False
    error = document["error"]
    texts = all(error[name] is None or isinstance(error[name], str) for name in error)
    return set(error) == {"message", "type", "param", "code"} and texts and bool(error["message"])


def _problem_of_events(body: bytes) -> str | None:
    events = body.decode().split("\n\n")
    if events[0].startswith("event: "):
        return _problem_of_named_events(events)
    if events.pop() != "" or not all(event.startswith("data: ") for event in events):
        return f"a stream with {body[-300:]!r} at its end"
    last = events.pop().removeprefix("data: ")
    if last != "[DONE]":
        document = json.loads(last)
        if not is_error(document) or document["error"]["type"] == "server_error":
            return f"a stream that ends with {last[:300]}"
    for event in events:
        if problem := _problem_of_document(json.loads(event.removeprefix("data: ")), event[:300]):
            return problem
    return None


def _problem_of_named_events(events: list[str]) -> str | None:
    """What is wrong with a stream of /v1/responses, whose last event tells how it ended."""
    if events.pop() != "":
        return f"a stream with {events[-1][-300:]!r} at its end"
    for index, event in enumerate(events):
        name, _, data = event.partition("\ndata: ")
        document = json.loads(data)
        if name != f"event: {document['type']}" or document["sequence_number"] != index:
            return f"event {index} is {event[:300]}"
    ends = ("response.completed", "response.incomplete")
    return None if document["type"] in ends else f"a stream that ends with {data[:300]}"


def _problem_of_document(document: Any, shown: str) -> str | None:
    """What is wrong with a document; agents of a round may have errors of their own."""
    entries = [document, *document.get("agents", ())] if isinstance(document, dict) else [document]
    for entry in entries:
        if entry.get("error") is not None:
            error = {"error": entry["error"]}
            if not is_error(error) or entry["error"]["type"] == "server_error":
                return f"{entry} in {shown}"
    return None
