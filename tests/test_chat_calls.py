"""Chat requests with tools over HTTP, as agents' clients send them, and what they are answered."""

import itertools
import json
from typing import Any

import httpx
import pytest

from serving import HELLO, chat, events

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"where": {"$ref": "#/$defs/Place"}},
    "required": ["where"],
    "additionalProperties": False,
    "$defs": {"Place": {"enum": ["pub", "park"]}},
}
PLACES = {**PARAMETERS, "$defs": {"Place": {"enum": ["here"]}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("walk", PARAMETERS), ("stay", PLACES))
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACES}}
NAMED = {"type": "function", "function": {"name": "walk"}}
HEARD: list[dict[str, Any]] = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "walk", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "walked"},
]  # fmt: skip


def ask(client: httpx.Client, messages: Any = HELLO, **fields: Any) -> dict[str, Any]:
    """The choice that is answered, whole and as a stream, which has to say the same."""
    fields = {"max_tokens": 200, **fields}
    response = chat(client, messages, **fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    stream = events(chat(client, messages, stream=True, **fields))
    deltas = [event["choices"][0]["delta"] for event in stream]
    content = "".join(delta.get("content", "") for delta in deltas)
    assert content == (choice["message"]["content"] or "")
    calls: list[dict[str, str]] = []
    for part in (call for delta in deltas for call in delta.get("tool_calls", ())):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append({"name": part["function"]["name"], "arguments": ""})
        calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert calls == [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert stream[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return choice


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("fields", [{}, {"response_format": FORMAT}])
def test_calls_that_are_required(client: httpx.Client, choice: Any, fields: dict[str, Any]) -> None:
    answer = ask(client, tools=TOOLS, tool_choice=choice, **fields)
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    calls = [call["function"] for call in answer["message"]["tool_calls"]]
    for call in calls:
        places = {"walk": ("pub", "park"), "stay": ("here",)}[call["name"]]
        assert json.loads(call["arguments"])["where"] in places
    if choice is NAMED:
        assert [call["name"] for call in calls] == ["walk"]
    for before, after in itertools.pairwise(calls):
        assert before != after


def test_a_format_with_tools(client: httpx.Client) -> None:
    for temperature in (0, 1):
        answer = ask(client, tools=TOOLS, response_format=FORMAT, temperature=temperature, seed=1)
        if answer["finish_reason"] == "stop":
            assert json.loads(answer["message"]["content"]) == {"where": "here"}
        else:
            assert answer["finish_reason"] == "tool_calls"
            assert answer["message"]["content"] is None
    # When the tools have answered, it is what the format says, though calls were required.
    for choice in ("required", NAMED, "none"):
        fields = {"tools": TOOLS, "response_format": FORMAT, "tool_choice": choice}
        answer = ask(client, HEARD, **fields)
        assert json.loads(answer["message"]["content"]) == {"where": "here"}
    # Without a format a call is a call, also the second.
    assert ask(client, HEARD, tools=TOOLS, tool_choice="required")["message"]["tool_calls"]


def test_a_call_that_is_cut_off(client: httpx.Client) -> None:
    whole = ask(client, tools=TOOLS, tool_choice=NAMED)["message"]["tool_calls"][0]["function"]
    for most in range(1, 66, 3):  # a token is a character
        answer = ask(client, tools=TOOLS, tool_choice=NAMED, max_tokens=most)
        assert answer["message"]["content"] in (None, "")
        for call in answer["message"].get("tool_calls", ()):
            assert whole["arguments"].startswith(call["function"]["arguments"])
        assert answer["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": False},
        {"functions": [], "function_call": None},
        {"function_call": "auto"},
        {"stop": ""},
        {"stop": []},
        {"stream_options": {"include_usage": None}, "response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"logit_bias": {}, "metadata": {}, "unheard_of": None},
        {"round": None, "private": None},
    ],
)
def test_empty_fields_are_as_if_absent(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert ask(client, max_tokens=8, **fields)["message"] == ask(client, max_tokens=8)["message"]


def test_nulls_within_fields_are_as_if_absent(client: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": None, "type": None, "index": None,
             "function": {"name": "walk", "arguments": None}}]},
        {"role": "tool", "tool_call_id": None, "content": None},
        {"role": "assistant", "content": [{"type": "text", "text": None}], "tool_calls": None},
        {"role": "user", "content": "b", "tool_calls": None},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {
        "name": "walk", "description": None, "strict": None, "parameters": None}}]  # fmt: skip
    fields = {"tools": tools, "tool_choice": "required", "response_format": None, "max_tokens": 9}
    ask(client, messages, **fields)
    schema = {"name": None, "strict": None, "schema": {"enum": ["a"], "required": None}}
    wanted = {"type": "json_schema", "json_schema": schema}
    assert ask(client, response_format=wanted)["message"]["content"] == '"a"'


def test_some_of_the_tools_are_allowed(client: httpx.Client) -> None:
    def choose(*names: str, mode: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    for name in ("walk", "stay"):
        fields = {"tools": TOOLS, "tool_choice": choose(name, mode="required")}
        calls = ask(client, temperature=1, seed=4, **fields)["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {name}
    assert chat(client, tools=TOOLS, tool_choice=choose("walk", mode="auto")).status_code == 200
    refused = chat(client, tools=TOOLS, tool_choice=choose("fly", mode="auto"))
    assert refused.status_code == 400
    assert "'fly'" in refused.json()["error"]["message"]
    for wrong in ({"type": "allowed_tools"}, {"type": "x"}, "sometimes", 3, choose(mode="auto")):
        refused = chat(client, tools=TOOLS, tool_choice=wrong)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith("tool_choice")
    refused = chat(client, tools=TOOLS, tool_choice={"type": "allowed_tools", "mode": "auto"})
    assert refused.json()["error"]["param"] == "tool_choice.allowed_tools"


def test_what_is_not_held_is_said(client: httpx.Client) -> None:
    odd = {**PARAMETERS, "properties": {**PARAMETERS["properties"], "file": {
        "type": "string", "format": "path"}}}  # fmt: skip
    tools = [
        *TOOLS,
        {"type": "function", "function": {"name": "read", "parameters": odd}},
    ]
    for stream in (False, True):
        response = chat(client, tools=tools, tool_choice="required", max_tokens=100, stream=stream)
        assert response.status_code == 200
        header = response.headers["x-tokendance-not-held"]
        assert header == "read: format 'path' of 'file'"
    assert "x-tokendance-not-held" not in chat(client, tools=TOOLS).headers
    strict = {"name": "read", "parameters": odd, "strict": True}
    refused = chat(client, tools=[{"type": "function", "function": strict}])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"
    assert "'read' is strict, and has format 'path' of 'file'" in refused.json()["error"]["message"]
