"""The server over HTTP, with a tiny random model, or with none where it does not matter.

What happens over time is in `test_dispatcher.py`, whose clock is its own.
"""

import asyncio
import itertools
import json
import logging
import math
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from cyclopts import UnknownOptionError
from pydantic import ValidationError

from fake_executor import FakeExecutor
from serving import HELLO, asking, chat, events, held, held_by, serving, wait_until
from tiny_models import SPECIALS, VOCAB
from tokendance import LLM, Agent, Prompt, SamplingParams
from tokendance.cli import app as command_line
from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import FileId, SessionKey
from tokendance.engine.request import Request
from tokendance.errors import ConfigError, ModelNotFoundError, StoreError
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.rounds.arrival_window import ArrivalWindow
from tokendance.rounds.discovery import Discovery
from tokendance.server.app import create_app
from tokendance.server.context import ServerContext
from tokendance.server.jobs import Job
from tokendance.server.logs import JsonFormatter
from tokendance.server.protocol import ChatRequest, RoundRequest
from tokendance.server.settings import ServerSettings
from tokendance.store.kv_rows import KVRows

MakeLLM = Callable[..., LLM]
Served = tuple[httpx.Client, ServerContext]
# 64 tokens for the tiny tokenizer, whose tokens are characters.
NEWS = "The baker says that bread is out until noon, so come back later."


@pytest.fixture(scope="module")
def roomy(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")


def without_model(fake: LoadedModel) -> LLM:
    num_slots = 2000 * 16
    options = EngineOptions(kv_budget=num_slots * fake.shape.kv_bytes_per_token(fake.dtype))
    return LLM.from_loaded(fake, options, executor=FakeExecutor(num_slots, VOCAB, SPECIALS))


@pytest.fixture(scope="module")
def server_without_model(fake: LoadedModel) -> Iterator[Served]:
    with serving(without_model(fake), max_body=100_000, max_messages=50) as both:
        yield both


@pytest.fixture(scope="module")
def server_with_model(roomy: LoadedModel) -> Iterator[Served]:
    with serving(LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))) as both:
        yield both


@pytest.fixture
def served(server_without_model: Served) -> Iterator[Served]:
    """A server that several tests share, which has forgotten what the one before has asked."""
    yield server_without_model
    forget(server_without_model[1])


@pytest.fixture
def served_model(server_with_model: Served) -> Iterator[Served]:
    """The same, where answers are those of a model."""
    yield server_with_model
    forget(server_with_model[1])


def forget(server: ServerContext) -> None:
    """Let a server be as it was when it began, but for its figures; nothing is left of anyone."""
    engine, dispatcher = server.llm.engine, server.engine_thread._dispatcher

    def forget() -> None:
        engine.check_integrity()
        engine.forget()
        dispatcher._discoveries.clear()
        assert not any(held_by(dispatcher).values())
        assert engine.status().resident_pages == engine.status().stored_pages == 0

    asyncio.run(server.engine_thread.call(forget))
    wait_until(server, lambda: not server.admission.num_open)  # a stream ends after its last event


LONG_ROUND = [
    {"agent": name, "system": f"I am {name}.", "task": "Speak.", "ignore_eos": True}
    for name in "ab"
]


def test_an_answer_has_openais_shape(served: Served) -> None:
    client, server = served
    document = chat(client).json()
    choice = document["choices"][0]
    assert document["object"] == "chat.completion"
    assert document["model"] == "tiny"
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = document["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # Asked again, all but the last token of the prompt is there.
    again = chat(client).json()
    assert again["choices"][0]["message"] == choice["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert 'tokendance_requests_total{reason="length"}' in client.get("/metrics").text
    assert server.admission.num_open == 0


def test_an_answer_is_what_the_library_gives(served_model: Served, roomy: LoadedModel) -> None:
    client, _ = served_model
    text = chat(client, max_tokens=12, ignore_eos=True).json()["choices"][0]["message"]["content"]
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**22))
    expected = llm.generate([Prompt(HELLO)], SamplingParams(max_tokens=12, ignore_eos=True))
    assert text == expected[0].text


def test_a_stream_holds_no_stop_text(served_model: Served) -> None:
    client, server = served_model
    encoder = server.llm.encoder
    forced = {str(encoder.text_ids(one)[0]): 100.0 for one in "E"}
    for stop in (["EEE"], ["E"], ["EE", "x"]):
        fields = {"logit_bias": forced, "stop": stop, "max_tokens": 9}
        whole = chat(client, **fields).json()["choices"][0]
        assert whole["message"]["content"] == ""
        assert whole["finish_reason"] == "stop"
        stream = events(chat(client, stream=True, **fields))
        assert not any(event["choices"][0]["delta"].get("content") for event in stream)


@pytest.mark.parametrize("stop", [None, ["e"]])
def test_a_stream_says_the_same(served_model: Served, stop: Any) -> None:
    client, _ = served_model
    fields = {"max_tokens": 20, "ignore_eos": True, "stop": stop, "n": 2, "seed": 3}
    fields |= {"temperature": 1}
    whole = chat(client, **fields).json()
    stream = events(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, expected in enumerate(whole["choices"]):
        deltas = [
            choice for event in stream for choice in event["choices"] if choice["index"] == index
        ]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in deltas)
        assert text == expected["message"]["content"]
        assert deltas[-1]["finish_reason"] == expected["finish_reason"]


def test_contents_that_clients_send(served: Served) -> None:
    client, _ = served
    conversation: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("one", "two")]},
        {"role": "user", "name": "Ann", "content": "three", "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "four"},
        {"role": "assistant", "name": "Bob", "content": "five"},
    ]  # fmt: skip
    silent: dict[str, Any] = {
        "seed": None,
        "top_p": None,
        "stop": None,
        "user": "me",
        "metadata": {"a": "b"},
    }
    silent |= {"reasoning_effort": "low", "verbosity": "low", "store": False, "tools": None}
    found = chat(client, conversation, **silent)
    assert found.status_code == 200, found.text
    # The speaker is part of what the model reads.
    nameless = [{**message, "name": None} for message in conversation]
    lengths = [
        chat(client, messages).json()["usage"]["prompt_tokens"]
        for messages in (conversation, nameless)
    ]
    assert lengths[0] - lengths[1] == len("Ann: ") + len("Bob: ")


def test_log_probabilities_and_biases(served_model: Served) -> None:
    client, _ = served_model
    choice = chat(client, logprobs=True, top_logprobs=3).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert content
    for entry in content:
        top = [one["logprob"] for one in entry["top_logprobs"]]
        assert top == sorted(top, reverse=True)
        assert entry["logprob"] == top[0]  # greedy
    biased = chat(client, logit_bias={"40": 100}, logprobs=True, max_tokens=3).json()["choices"][0]
    tokens = [entry["token"] for entry in biased["logprobs"]["content"]]
    assert len(tokens) == 3
    assert len(set(tokens)) == 1


def test_completions_of_text_and_ids(served: Served) -> None:
    client, _ = served

    def complete(prompt: Any, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 5, **fields}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    both = complete([[40, 41, 42], [50, 51]])
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == 5
    assert both["choices"][1]["text"] == complete([50, 51])["choices"][0]["text"]
    assert len(complete("abc", logprobs=2)["choices"][0]["logprobs"]["tokens"]) > 0
    body = {"model": "tiny", "prompt": "abc", "stream": True, "temperature": 0, "max_tokens": 5}
    stream = events(client.post("/v1/completions", json=body))
    text = "".join(choice["text"] for event in stream for choice in event["choices"])
    assert text == complete("abc")["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x"}] * 51}, 413, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 99}, 400, "n"),
        ({"presence_penalty": 3}, 400, "presence_penalty"),
        ({"functions": [{}]}, 400, "functions"),
        ({"function_call": {"name": "f"}}, 400, "function_call"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logit_bias": {"hello": 1}}, 400, "logit_bias"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"n": 10**9}, 400, "n"),
        ({"messages": [0] * 30_000}, 400, "messages.0"),
        ({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            400,
            "response_format.json_schema",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    served: Served, fields: dict[str, Any], status: int, param: str
) -> None:
    client, server = served
    response = chat(client, **fields)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"]
    assert server.admission.num_open == 0
    assert chat(client).status_code == 200


def test_bodies_that_are_no_request(served: Served, make_fake_llm: MakeLLM) -> None:
    client, _ = served
    url = "/v1/chat/completions"
    headers = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"null", b"[" * 5000):
        assert client.post(url, content=body, headers=headers).status_code == 400
    assert client.post(url, content='{"model": "\u2200"}'.encode("utf-16")).status_code == 400
    assert client.post(url, content=b"x" * 200_000).status_code == 413
    chunks = (b"x" * 1000 for _ in range(200))  # does not say how long it is
    assert client.post(url, content=chunks).status_code == 413
    with serving(make_fake_llm(), max_body_objects=20) as (few, _):
        for many in (b'[{"a":"}"},' * 21, b"[" * 168, b'{"a":[' + b"1," * 1100, b'"a":' * 84):
            assert few.post(url, content=many).status_code == 413
        parts = [{"type": "text", "text": "x"}]
        for count, status in ((18, 200), (21, 413)):
            talk = [{"role": "user", "content": parts * count}]
            assert chat(few, talk, max_tokens=1).status_code == status
    assert client.get(url).status_code == 405
    assert client.get("/nothing").status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {f"unknown{index}": 0 for index in range(3000)},
        {"modalities": [0] * 3000},
        {"logit_bias": {str(index): "x" for index in range(3000)}},
        {"messages": [{"role": "assistant", "tool_calls": [0] * 3000}]},
        {"messages": [{"role": "user", "content": [0] * 3000}] * 3000},
        {"stop": [0] * 3000},
        {"round": {f"unknown{index}": 0 for index in range(3000)}},
        {"agents": [{"agent": "a", **{f"unknown{index}": 0 for index in range(3000)}}]},
        {"agents": [{"agent": "a"}], "blocks": {str(index): 0 for index in range(5000)}},
    ],
)
def test_not_all_mistakes_of_a_body_are_listed(fields: dict[str, Any]) -> None:
    """A body of some megabytes can hold a million, and each is a document of its own."""
    kind: type[ChatRequest | RoundRequest] = RoundRequest if "agents" in fields else ChatRequest
    body: dict[str, Any] = {"model": "tiny", **({} if "agents" in fields else {"messages": HELLO})}
    with pytest.raises(ValidationError) as invalid:
        kind.model_validate({**body, **fields})
    assert invalid.value.error_count() < 10


def test_texts_that_no_context_holds_are_not_tokenized(make_llm: MakeLLM) -> None:
    words = "word " * 20_000
    call = {"function": {"name": "f", "arguments": words}}
    ref = {"type": "block", "id": "b"}
    agents: list[dict[str, Any]] = [
        {"agent": "a", "segments": [ref]},
        {"agent": "b", "messages": [{"role": "user", "content": words}]},
        {
            "agent": "c",
            "messages": [{"role": "user", "content": [{"type": "text", "text": words}]}],
        },
        {"agent": "d", "segments": [{"type": "block", "id": "s"}] * 2},
    ]
    blocks = {"b": words, "s": words[:40_000]}
    with serving(make_llm()) as (client, server):
        assert 40_000 < server.max_characters < 80_000
        for fields in (
            {"messages": [{"role": "user", "content": words}]},
            {"messages": [{"role": "assistant", "tool_calls": [call]}]},
            {"tools": [{"type": "function", "function": {"name": "f", "description": words}}]},
        ):
            refused = chat(client, **fields)
            assert refused.status_code == 400
            assert "characters" in refused.json()["error"]["message"]
        body = {"model": "tiny", "blocks": blocks, "agents": agents}
        for agent in client.post("/v1/rounds", json=body).json()["agents"]:
            assert "characters" in agent["error"]["message"]


def test_json_is_sure_to_parse(served_model: Served) -> None:
    client, _ = served_model
    schema = {
        "type": "object",
        "properties": {
            "mood": {"enum": ["good", "bad"]},
            "count": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["mood", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(3):
        answer = chat(client, response_format=wanted, max_tokens=80, temperature=1, seed=seed)
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert found["mood"] in ("good", "bad")
        assert 0 <= found["count"] <= 99


def test_tool_calls_are_sure_to_parse(served_model: Served) -> None:
    client, _ = served_model
    parameters = {
        "type": "object",
        "properties": {"where": {"enum": ["pub", "park"]}},
        "required": ["where"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("walk", "run")
    ]
    fields = {"tools": tools, "max_tokens": 200, "temperature": 1, "parallel_tool_calls": False}
    for choice, names in (
        ("required", {"walk", "run"}),
        ({"type": "function", "function": {"name": "run"}}, {"run"}),
    ):
        document = chat(client, tool_choice=choice, **fields).json()
        answer = document["choices"][0]
        assert answer["finish_reason"] == "tool_calls"
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] in names
        assert json.loads(call["function"]["arguments"])["where"] in ("pub", "park")
    stream = events(chat(client, tool_choice="required", stream=True, **fields))
    deltas = [event["choices"][0]["delta"] for event in stream]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert len([call for call in calls if "id" in call]) == 1
    assert not any(delta.get("content") for delta in deltas)
    assert chat(client, tool_choice="auto", **fields).status_code == 200


def prompts_of_a_round(agents: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "system", "content": f"{name}, whom they call {name * 3}, number {index}"},
            {"role": "user", "content": f"{NEWS} And you, {name}?"},
        ]
        for index, name in enumerate("abcdefgh"[:agents])
    ]


def together(
    client: httpx.Client, server: ServerContext, prompts: list[Any], **fields: Any
) -> list[httpx.Response]:
    """Ask all at once, so that they are in one window, however long it is."""
    worker = server.engine_thread
    with ThreadPoolExecutor(len(prompts)) as pool:
        with held(server):
            asked = [pool.submit(chat, client, prompt, **fields) for prompt in prompts]
            # Each is announced, and then handed in.
            wait_until(server, lambda: worker._inbox.qsize() == 2 * len(prompts))
        return [one.result(60) for one in asked]


def cached(response: httpx.Response) -> int:
    count: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_requests_that_come_together_share(served: Served) -> None:
    client, server = served
    responses = together(client, server, prompts_of_a_round(5))
    assert all(response.status_code == 200 for response in responses)
    reused = sorted(cached(response) for response in responses)
    assert reused[0] < len(NEWS) // 2  # who computes it
    assert all(count >= 0.8 * len(NEWS) - 10 for count in reused[1:])
    buckets = re.findall(r'round_agents_bucket\{le="(\S+)"\} (\S+)', client.get("/metrics").text)
    counts = {bound: float(count) for bound, count in buckets}
    assert counts["5.0"] == counts["3.0"] + 1
    # One that comes late finds it, too.
    late = chat(client, prompts_of_a_round(6)[5])
    assert cached(late) >= 0.8 * len(NEWS) - 10


def test_one_that_goes_on_alone_finds_what_it_has_reused(served: Served) -> None:
    client, server = served
    prompts = prompts_of_a_round(3)
    lengths = [one.json()["usage"]["prompt_tokens"] for one in together(client, server, prompts)]
    for prompt, length in zip(prompts, lengths, strict=True):
        more = [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
        # Whoever computed the news for the others, and those whose KV is not exact.
        assert cached(chat(client, [*prompt, *more])) >= length - 1


def test_a_round_with_an_id_waits_for_all(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=2000)
    first, second, third = prompts_of_a_round(3)
    with (
        serving(llm, window_ms=0, round_wait=60.0) as (client, server),
        ThreadPoolExecutor(3) as pool,
    ):
        arrivals = server.engine_thread._dispatcher.arrivals

        def num_waiting() -> int:
            return sum(len(named.waiting) for named in arrivals._named.values())

        asked: dict[str, Any] = {"round": {"id": "r1", "size": 3}}
        waiting = [pool.submit(chat, client, prompt, **asked) for prompt in (first, second)]
        wait_until(server, lambda: num_waiting() == 2)
        assert chat(client).status_code == 200
        assert not any(one.done() for one in waiting)
        responses = [chat(client, third, **asked), *(one.result(60) for one in waiting)]
        assert sorted(cached(response) > 40 for response in responses) == [False, True, True]
        assert not arrivals.num_named
        # One that goes away before its round begins leaves nothing behind.
        with asking(client, messages=first, round={"id": "r2", "size": 9}):
            wait_until(server, lambda: num_waiting() == 1)
        wait_until(server, lambda: not arrivals.num_named)
        wait_until(server, lambda: server.admission.num_open == 0)
        # Nor does it count when it asks again.
        asked = {"round": {"id": "r3", "size": 3}}
        waiting = [pool.submit(chat, client, first, **asked)]
        wait_until(server, lambda: num_waiting() == 1)
        for _ in range(2):
            with asking(client, messages=second, **asked):
                wait_until(server, lambda: num_waiting() == 2)
            wait_until(server, lambda: num_waiting() == 1)
        waiting.append(pool.submit(chat, client, second, **asked))
        wait_until(server, lambda: num_waiting() == 2)
        assert chat(client).status_code == 200
        assert not any(one.done() for one in waiting)
        responses = [chat(client, third, **asked), *(one.result(60) for one in waiting)]
        assert all(response.status_code == 200 for response in responses)


def test_a_whole_round_in_one_call(served: Served) -> None:
    client, server = served
    blocks = {"x": NEWS, "y": NEWS[::-1]}
    listed = [{"type": "block", "id": name} for name in blocks]
    agents = [
        {
            "agent": name,
            "temperature": 0,
            "max_tokens": 5,
            "messages": [
                {"role": "system", "content": f"I am {name}"},
                {"role": "user", "content": [*listed, {"type": "text", "text": "And you?"}]},
            ],
        }
        for name in ("ann", "bob")
    ]
    agents.append({"agent": "eve", "segments": [{"type": "block", "id": "nothing"}]})
    agents.append({"agent": "joe", "segments": [*listed], "max_tokens": 3, "temperature": 0})
    body = {"model": "tiny", "blocks": blocks, "agents": agents}
    document = client.post("/v1/rounds", json=body).json()
    found = document["agents"]
    assert [one["agent"] for one in found] == ["ann", "bob", "eve", "joe"]
    assert "nothing" in found[2]["error"]["message"]
    reused = [
        found[index]["usage"]["prompt_tokens_details"]["cached_tokens"] for index in (0, 1, 3)
    ]
    assert sorted(reused)[1] >= 2 * (len(NEWS) - 10)
    stream = events(client.post("/v1/rounds", json={**body, "stream": True}))
    assert {event["agent"] for event in stream} == {"ann", "bob", "eve", "joe"}
    for event in stream:
        if "message" in event:
            assert event["message"] == found[event["index"]]["message"]
    body["agents"] = [agents[0], agents[0]]
    assert client.post("/v1/rounds", json=body).json()["error"]["param"] == "agents"
    wait_until(server, lambda: not server.admission.num_open)


def ask_session(client: httpx.Client, names: str, task: str, **fields: Any) -> httpx.Response:
    agents = [
        {
            "agent": name,
            "system": f"I am {name}, and my number is {name * 5}.",
            "task": task,
            "max_tokens": 6,
            "temperature": 0,
            "ignore_eos": True,
        }
        for name in names
    ]
    body = {"model": "tiny", "session": "town", "agents": agents, **fields}
    return client.post("/v1/rounds", json=body)


def test_a_session_remembers_and_lasts(roomy: LoadedModel, tmp_path: Path) -> None:
    def said(response: httpx.Response) -> dict[str, str]:
        assert response.status_code == 200, response.text
        return {one["agent"]: one["message"]["content"] for one in response.json()["agents"]}

    def start() -> LLM:
        llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
        llm.open_store(tmp_path / "store")
        return llm

    library = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    people = [Agent(name, f"I am {name}, and my number is {name * 5}.") for name in "abc"]
    session = library.session(
        agents=people[:2], params=SamplingParams(max_tokens=6, ignore_eos=True)
    )
    expected = [session.run("one"), session.run("two")]
    session.leave("a")
    session.join(people[2])
    expected.append(session.run("three"))
    words = [{output.agent: output.text for output in result.outputs} for result in expected]
    with serving(llm := start()) as (client, server):
        assert said(ask_session(client, "ab", "one")) == words[0]
        # The order in which a client names them is not that of the blocks.
        assert said(ask_session(client, "ba", "two")) == words[1]
        refused = ask_session(client, "ab", "x", agents=[{"agent": "new", "task": "x"}])
        assert refused.status_code == 400
        assert "Say who it is" in refused.json()["error"]["message"]
        refused = ask_session(client, "ab", "x", blocks={"a": "b"})
        assert refused.json()["error"]["param"] == "blocks"
        assert server.admission.num_open == 0
    llm.close()
    with serving(llm := start()) as (client, server):
        stream = events(ask_session(client, "bc", "three", stream=True))
        assert {event["agent"]: event["message"]["content"] for event in stream} == words[2]
        assert {event["round"] for event in stream} == {3}
        on_disk = re.search(r"\ntokendance_kv_bytes_on_disk (\S+)", client.get("/metrics").text)
        assert on_disk is not None
        assert float(on_disk[1]) > 10_000
        wait_until(server, lambda: not server.admission.num_open)
    llm.engine.check_integrity()
    llm.close()


def test_a_round_that_is_refused_leaves_a_session_as_it_was(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm()) as (client, _):
        assert ask_session(client, "ab", "one").status_code == 200
        assert ask_session(client, "ac", "two", blocks={"a": "b"}).status_code == 400
        here = [{"agent": name, "task": "two", "max_tokens": 3} for name in "ab"]
        assert ask_session(client, "", "", agents=here).status_code == 200
        new = [*here, {"agent": "c", "task": "two"}]
        assert "Say who it is" in ask_session(client, "", "", agents=new).json()["error"]["message"]


def test_chat_requests_may_name_a_session(roomy: LoadedModel, tmp_path: Path) -> None:
    cached_tokens = []
    for number in range(2):
        llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
        llm.open_store(tmp_path / "store")
        with serving(llm, round_wait=30.0) as (client, _):
            asked = {"round": {"id": f"r{number}", "size": 1, "agent": "ann", "session": "s"}}
            cached_tokens.append(cached(chat(client, prompts_of_a_round(1)[0], **asked)))
        llm.close()
    assert cached_tokens[0] == 0
    assert cached_tokens[1] > 80


def test_a_round_may_wait_for_ever(make_fake_llm: MakeLLM) -> None:
    first, second = prompts_of_a_round(2)
    with (
        serving(make_fake_llm(num_pages=2000), round_wait=math.inf) as (client, server),
        ThreadPoolExecutor(1) as pool,
    ):
        asked: dict[str, Any] = {"round": {"id": "r1", "size": 2}}
        waiting = pool.submit(chat, client, first, **asked)
        arrivals = server.engine_thread._dispatcher.arrivals
        wait_until(server, lambda: any(named.waiting for named in arrivals._named.values()))
        assert chat(client, second, **asked).status_code == 200
        assert waiting.result(60).status_code == 200


def test_who_has_not_spoken_since_a_restart_is_kept_too(roomy: LoadedModel, tmp_path: Path) -> None:
    prompts = prompts_of_a_round(2)
    for number, agents in enumerate(("ab", "a", "b")):
        llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
        llm.open_store(tmp_path / "store")
        with serving(llm, round_wait=30.0) as (client, _), ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(
                    chat,
                    client,
                    prompts["ab".index(name)],
                    round={"id": str(number), "size": len(agents), "agent": name, "session": "s"},
                )
                for name in agents
            ]
            read = [cached(one.result(60)) for one in asked]
        llm.close()
        if number > 0:
            assert read[0] > 100  # all of its prompt, its own words too


def test_what_nobody_saves_is_removed_while_nothing_happens(
    roomy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of a round that all clients have left, in a server that nobody asks."""
    monkeypatch.setattr("tokendance.tier.background._ABANDONED_S", 0.05)
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    files = tmp_path / "store" / "kv"
    with serving(llm, default_max_tokens=2000) as (client, server):
        with asking(client, "/v1/rounds", session="town", agents=LONG_ROUND):
            wait_until(server, lambda: any(files.iterdir()))
        wait_until(server, lambda: server.admission.num_open == 0 and not llm.engine.has_work)
        wait_until(server, lambda: not any(files.iterdir()))
        assert llm.tier is not None
        assert llm.tier.due_s() is None
    llm.close()


@pytest.mark.parametrize("way", ["session", "chat"])
def test_others_are_answered_while_a_session_is_read(
    roomy: LoadedModel, tmp_path: Path, way: str
) -> None:
    def start() -> LLM:
        llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
        llm.open_store(tmp_path / "store")
        return llm

    def ask(client: httpx.Client, number: int) -> httpx.Response:
        if way == "session":
            return ask_session(client, "ab", f"the {number}th task")
        asked = {"round": {"id": f"r{number}", "size": 1, "agent": "ann", "session": "s"}}
        return chat(client, prompts_of_a_round(1)[0], **asked)

    with serving(llm := start()) as (client, _):
        assert ask(client, 0).status_code == 200
    llm.close()
    with (
        serving(llm := start(), round_wait=30.0) as (client, server),
        ThreadPoolExecutor(1) as own,
    ):
        assert llm.tier is not None
        reads, may_read = itertools.count(), threading.Event()
        read = llm.tier.disk.read

        def wait_and_read(file: WrittenFile) -> KVRows:
            assert next(reads) == 0 or may_read.wait(60)  # all but the first wait
            return read(file)

        llm.tier.disk.read = wait_and_read  # type: ignore[method-assign]
        asked = own.submit(ask, client, 1)
        wait_until(server, lambda: any(llm.kv_store.in_transit.values()))
        assert chat(client).status_code == 200
        asyncio.run(server.engine_thread.call(llm.engine.check_integrity))
        assert not asked.done()
        may_read.set()
        assert asked.result(60).status_code == 200
        assert cached(asked.result()) > 80 if way == "chat" else asked.result().json()["round"] == 2
        assert server.admission.num_open == 0
    llm.engine.check_integrity()
    llm.close()


def test_a_session_that_cannot_be_read_is_nobody_elses_trouble(
    roomy: LoadedModel, tmp_path: Path
) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    assert llm.tier is not None
    with serving(llm) as (client, _):
        assert ask_session(client, "ab", "one").status_code == 200
        llm.kv_store.clear()

        def fail(_: WrittenFile) -> KVRows:
            raise MemoryError

        read = llm.tier.disk.read
        llm.tier.disk.read = fail  # type: ignore[method-assign,assignment]
        assert ask_session(client, "ab", "two").status_code == 507
        assert chat(client).status_code == 200
        llm.tier.disk.read = read  # type: ignore[method-assign]
        assert ask_session(client, "ab", "two").json()["round"] == 2
    llm.close()


@pytest.mark.parametrize("way", ["chat", "session"])
def test_a_disk_that_is_slow_to_write_holds_nobody_up(
    roomy: LoadedModel, tmp_path: Path, way: str
) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    assert llm.tier is not None
    disk, may_write, engines = llm.tier.disk, threading.Event(), set[str]()
    write = disk.write

    def wait_and_write(rows: KVRows) -> tuple[FileId, WrittenFile]:
        engines.add(threading.current_thread().name)
        assert may_write.wait(60)
        return write(rows)

    disk.write = wait_and_write  # type: ignore[method-assign]
    with serving(llm) as (client, server), ThreadPoolExecutor(1) as own:
        named = {"round": {"id": "r", "size": 1, "agent": "ann", "session": "s"}}
        asked = (
            own.submit(chat, client, prompts_of_a_round(1)[0], **named)
            if way == "chat"
            else own.submit(ask_session, client, "ab", "Speak.")
        )
        wait_until(server, lambda: engines)
        assert chat(client).status_code == 200
        if way == "chat":
            assert asked.result(60).status_code == 200  # what it has said is not the server's
        else:
            assert not asked.done()  # it is answered when it is on disk
        assert disk.index.session_keys() == []
        may_write.set()
        assert asked.result(60).status_code == 200
        wait_until(server, disk.index.session_keys)
    assert engines == {"store_0"}
    assert len(disk.index.session_keys()) == 1
    assert disk.verify() == []
    llm.close()


@pytest.mark.parametrize("where", ["discovery", "adding", "step"])
def test_an_engine_that_fails_answers_all(
    fake: LoadedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """What has just been taken out of a queue, too."""
    llm = without_model(fake)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with serving(llm, round_wait=0.0) as (client, server):
        assert chat(client).status_code == 200
        if where == "discovery":
            monkeypatch.setattr(Discovery, "segment", fail)
        else:
            name = "add" if where == "adding" else "tick"
            monkeypatch.setattr(llm.engine, name, fail)
        with ThreadPoolExecutor(4) as pool:
            with held(server):
                asked = [
                    pool.submit(chat, client, **fields)
                    for fields in ({}, {"n": 2}, {"round": {"id": "r", "size": 2}})
                ]
                asked.append(pool.submit(ask_round, client))
                wait_until(server, lambda: server.engine_thread._inbox.qsize() == 2 * 3 + 1)
            *answers, of_round = [one.result(60) for one in asked]
        codes = [one.status_code for one in answers]
        failed = ["error" in one for one in of_round.json().get("agents", [{"error": 503}])]
        if where == "discovery":  # nothing is found then, and that is all
            assert codes == [200] * 3
            assert not any(failed)
            assert client.get("/health").status_code == 200
        else:
            assert codes == [503] * 3
            assert all(failed)
            assert client.get("/health").status_code == 503
        assert server.admission.num_open == 0


def ask_round(client: httpx.Client) -> httpx.Response:
    agents = [{"agent": name, "messages": HELLO, "max_tokens": 3} for name in "ab"]
    return client.post("/v1/rounds", json={"model": "tiny", "agents": agents})


def test_a_round_of_several_sessions_keeps_each(roomy: LoadedModel, tmp_path: Path) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    assert llm.tier is not None
    index = llm.tier.disk.index

    def of(name: str, **fields: Any) -> dict[str, Any]:
        return {"id": "r", "size": 2, "agent": name, "session": name, **fields}

    with serving(llm, round_wait=60.0) as (client, server), ThreadPoolExecutor(2) as pool:
        prompt = prompts_of_a_round(1)[0]
        for one in [pool.submit(chat, client, prompt, round=of(name)) for name in "ab"]:
            assert one.result(60).status_code == 200
        wait_until(server, lambda: {key.name for key in index.session_keys()} == {"a", "b"})
        # Not of who goes away before the round begins.
        arrivals = server.engine_thread._dispatcher.arrivals
        with asking(client, messages=prompt, round=of("d")):
            wait_until(server, lambda: arrivals.num_named == 1)
        wait_until(server, lambda: not arrivals.num_named)
        assert {key.name for key in index.session_keys()} == {"a", "b"}
    llm.close()


def test_sessions_of_one_tenant_do_not_displace_anothers(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendance.server.sessions._MAX_SESSIONS", 3)
    with serving(make_fake_llm(num_pages=2000), api_keys=("one", "two")) as (client, _):

        def ask(tenant: str, session: str, **fields: Any) -> httpx.Response:
            client.headers["authorization"] = f"Bearer {tenant}"
            agents = [{"agent": "a", "task": "Speak.", "max_tokens": 2, **fields}]
            body = {"model": "tiny", "session": session, "agents": agents}
            return client.post("/v1/rounds", json=body)

        assert ask("two", "town", system="I am A.").json()["round"] == 1
        for number in range(5):
            assert ask("one", f"s{number}").status_code == 400  # nobody has said who A is
            assert ask("one", f"t{number}", system="I am A.").json()["round"] == 1
        assert ask("two", "town").json()["round"] == 2
        assert ask("one", "t4").json()["round"] == 2
        assert ask("one", "t0").status_code == 400  # forgotten, for want of a store


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_stored_is_answered_with_a_warning(
    roomy: LoadedModel, tmp_path: Path, stream: bool
) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    assert llm.tier is not None
    disk = llm.tier.disk
    with serving(llm) as (client, _):
        assert ask_session(client, "ab", "one").status_code == 200
        commit = disk.commit

        def fail(*_: object, **__: object) -> None:
            raise StoreError("The disk is full.")

        disk.commit = fail  # type: ignore[method-assign]
        response = ask_session(client, "ab", "two", stream=stream)
        assert response.status_code == 200
        agents = events(response) if stream else response.json()["agents"]
        assert all(one["message"]["content"] for one in agents)
        assert sum("The disk is full." in one.get("warning", "") for one in agents) == 1
        disk.commit = commit  # type: ignore[method-assign]
        agents = ask_session(client, "ab", "three").json()["agents"]
        assert not any("warning" in one for one in agents)
        stored = disk.session(SessionKey("", "town"))
        assert stored is not None
        assert stored.round == 3
    llm.close()


def test_how_long_a_session_lasts_can_be_said_anew(roomy: LoadedModel, tmp_path: Path) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    llm.open_store(tmp_path / "store")
    assert llm.tier is not None
    disk = llm.tier.disk
    with serving(llm) as (client, _):
        for given, expected in ((None, None), (50.0, 50.0), (None, 50.0), (1e6, 1e6)):
            assert ask_session(client, "ab", "Speak.", ttl_s=given).status_code == 200
            stored = disk.session(SessionKey("", "town"))
            assert stored is not None
            assert stored.ttl_s == expected
            refused = ask_session(client, "ab", "Speak.", ttl_s=1.0, blocks={"a": "b"})
            assert refused.status_code == 400  # and says nothing
    assert llm.session("town").ttl_s == 1e6
    llm.close()


def test_agents_asked_one_after_another_share(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(num_pages=2000)) as (client, _):
        reused = [cached(chat(client, prompt)) for prompt in prompts_of_a_round(4)]
        assert reused[0] == 0
        assert all(count >= 0.8 * len(NEWS) - 10 for count in reused[1:])
        # A conversation that goes on by itself is exact: all of it is its own beginning.
        talk = [{"role": "user", "content": "Which is the way to the mill, and who lives there?"}]
        for turn in range(3):
            answer = chat(client, talk)
            talk += [
                {"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]},
                {"role": "user", "content": f"Question {turn}: how far is it from here to there?"},
            ]
            assert (cached(answer) > 0) == (turn > 0)
        text = client.get("/metrics").text
        assert 'tokendance_first_token_seconds_count{reuse="prefix"} 2.0' in text
        assert 'tokendance_first_token_seconds_count{reuse="collective"} 3.0' in text


def test_agents_one_after_another_share_nothing_where_it_is_off(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(num_pages=2000), recent=0.0) as (client, _):
        assert [cached(chat(client, prompt)) for prompt in prompts_of_a_round(3)] == [0, 0, 0]


def test_shadows_run_while_nobody_waits(
    roomy: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendance.fidelity.idle_shadows.IDLE_S", 0.01)
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24, shadow=1.0))
    with serving(llm) as (client, server):
        together(client, server, prompts_of_a_round(4))
        wait_until(server, lambda: b"shadow_kl_nats_count 3.0" in server.metrics.text())
    assert not llm.engine.has_work


class Lines(logging.Handler):
    """Hands over what is logged, as JSON: a line is written after the answer has gone."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(JsonFormatter().format(record))

    def get(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self._lines.get(timeout=60))
        return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, handler = logging.getLogger("tokendance.server.requests"), Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.setLevel(logging.NOTSET)
    log.removeHandler(handler)


def test_a_request_has_an_id_and_a_line(served: Served, lines: Lines) -> None:
    client, _ = served
    secret = "the secret of the mill"
    answer = chat(client, [{"role": "user", "content": secret}])
    first = lines.get()
    assert first["id"] == answer.headers["x-request-id"]
    assert first["status"] == 200
    assert first["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert secret not in json.dumps(first)
    own = client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == lines.get()["id"] == "mine-1"
    bad = client.get("/v1/models", headers={"x-request-id": "a b"})
    assert bad.headers["x-request-id"] == lines.get()["id"]
    assert bad.headers["x-request-id"].startswith("req-")


def test_tenants_share_nothing(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=2000)
    with serving(llm, api_keys=("one", "two")) as (client, _):
        assert chat(client).status_code == 401
        client.headers["authorization"] = "Bearer three"
        assert chat(client).status_code == 401
        for key in ("one", "two"):
            client.headers["authorization"] = f"Bearer {key}"
            assert cached(chat(client)) == 0
            assert cached(chat(client)) > 0


def test_who_has_no_key_is_refused_unread(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(), api_keys=("one",), max_body=1000) as (client, _):
        for key, size, status in (("two", 500, 401), ("one", 2000, 413), ("two", 2000, 401)):
            # The body is announced and never sent.
            head = HTTPConnection("127.0.0.1", client.base_url.port, timeout=20)
            head.putrequest("POST", "/v1/chat/completions")
            head.putheader("Authorization", f"Bearer {key}")
            head.putheader("Content-Length", str(size))
            head.endheaders()
            answer = head.getresponse()
            assert answer.status == status
            assert json.load(answer)["error"]["message"]
            head.close()


def test_a_body_that_never_comes_is_not_waited_for(make_fake_llm: MakeLLM) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1})
    with serving(make_fake_llm(), body_timeout=0.05) as (client, _):
        for content, status in (("{", 408), (body, 200)):
            with socket.create_connection(("127.0.0.1", client.base_url.port or 0), 60) as slow:
                slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n{content}".encode())
                answer = HTTPResponse(slow)
                answer.begin()
                assert answer.status == status
                answer.close()


def test_what_needs_a_key(make_fake_llm: MakeLLM) -> None:
    paths = ["/metrics", "/openapi.json", "/docs", "/v1/models", "/nothing"]
    with serving(make_fake_llm(), api_keys=("one",)) as (client, _):
        assert [client.get(path).status_code for path in paths] == [401] * 5
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        client.headers["authorization"] = "Bearer one"
        assert [client.get(path).status_code for path in paths] == [200] * 4 + [404]
    with serving(make_fake_llm(), api_keys=("one",), open_metrics=True) as (client, _):
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_too_many_are_told_to_come_back(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(), max_open_requests=1, round_wait=60.0) as (client, server):
        with asking(client, messages=HELLO, round={"id": "r", "size": 2}):
            wait_until(server, lambda: server.admission.num_open)
            refused = chat(client)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        wait_until(server, lambda: not server.admission.num_open)
        assert chat(client).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_its_pages_are_free_within_one_step(
    make_llm: MakeLLM, roomy: LoadedModel, stream: bool
) -> None:
    """Requests that run when a step begins, and the step before which the server learns of it."""
    llm = make_llm(num_pages=2000, model=roomy)
    engine = llm.engine
    tick, running = engine.tick, list[set[Request]]()
    taken_back: dict[Request, int] = {}

    def counted_tick(now: float | None = None) -> None:
        engine.check_integrity()
        if engine.has_work:
            running.append(set(engine._engine.scheduler.running))
        tick(now)

    with serving(llm, default_max_tokens=3900) as (client, server):
        cancel = server.engine_thread.cancel

        def noted_cancel(jobs: Iterable[Job]) -> None:
            given = list(jobs)
            for job in given:
                taken_back.setdefault(job.request, len(running))
            cancel(given)

        engine.tick = counted_tick  # type: ignore[method-assign]
        server.engine_thread.cancel = noted_cancel  # type: ignore[method-assign]

        def saying(text: str) -> AbstractContextManager[HTTPConnection]:
            messages = [{"role": "user", "content": text}]
            return asking(client, messages=messages, ignore_eos=True, stream=stream)

        with saying("I stay"):
            wait_until(server, lambda: len(running) > 1)
            (stays,) = running[-1]
            with saying("I go"):
                wait_until(server, lambda: len(running[-1]) == 2)
                (leaves,) = running[-1] - {stays}
            wait_until(server, lambda: leaves in taken_back)
            first = taken_back[leaves]
            wait_until(server, lambda: len(running) > first + 3)
            # The step of that number may have begun at that very moment; no later one has it.
            assert all(one == {stays} for one in running[first + 1 :])
            assert leaves.allocation is None
        wait_until(server, lambda: not server.admission.num_open and not engine.has_work)
    assert engine.status().resident_pages == 0


def test_an_engine_that_fails_leaves_nobody_waiting(
    fake: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = without_model(fake)

    def fail(_: float) -> None:
        raise RuntimeError("out of order")

    with serving(llm, round_wait=60.0) as (client, server), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, client, round={"id": "r", "size": 2})
        wait_until(server, lambda: server.engine_thread._dispatcher.arrivals.num_named)
        monkeypatch.setattr(llm.engine, "tick", fail)
        assert chat(client).status_code == 503
        assert waiting.result(60).status_code == 503
        assert chat(client).status_code == 503
        assert client.get("/health").status_code == 503
        assert server.admission.num_open == 0


def test_who_no_longer_waits_for_the_engine_harms_nobody(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm()) as (client, server):
        busy = threading.Event()

        def hold() -> None:
            busy.wait(60)

        async def leave() -> None:
            server.engine_thread._put(hold)
            waiting = asyncio.ensure_future(server.engine_thread.call(lambda: None))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        asyncio.run(leave())
        busy.set()
        assert chat(client).status_code == 200


def test_many_at_once_are_all_answered(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(num_pages=300)) as (client, server):
        prompts = [[{"role": "user", "content": f"{NEWS} {index}"}] for index in range(64)]
        responses = together(client, server, prompts, max_tokens=4)
        assert [response.status_code for response in responses] == [200] * 64


def test_the_window() -> None:
    window: ArrivalWindow[str] = ArrivalWindow(gap_s=0.004, share=0.05, lone_s=1.0)
    assert window.due_s() is None
    window.add("a", 10.0)
    assert window.take(10.003) == []
    window.add("b", 10.003)
    assert window.take(10.006) == []
    assert window.take(10.0071) == ["a", "b"]
    for place in range(40):  # a stream of arrivals does not keep the first waiting for ever
        window.add(str(place), 20.0 + 0.002 * place)
    assert window.due_s() == pytest.approx(20.05)
    assert window.remove("3")
    assert not window.remove("3")
    assert len(window.take(math.inf)) == 39
    window.add("c", 30.0)
    window.num_expected = 1  # somebody is still being read
    assert window.due_s() == pytest.approx(30.05)
    for _ in range(100):
        window.note_lone(0.02)
    assert window.due_s() == pytest.approx(30.001, abs=1e-4)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ServerSettings(host="0.0.0.0")
    ServerSettings(host="0.0.0.0", api_keys=("secret",))
    ServerSettings(host="::1")
    file = tmp_path / "serve.toml"
    file.write_text("prot = 8000\n")
    with pytest.raises(UnknownOptionError, match=r"prot.* from .*serve\.toml"):
        command_line(["serve", "--config", str(file)])
    file.write_text('model = "no-such-model"\n')
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        command_line(["serve", "--config", str(file)])


def test_the_engine_ends_however_the_server_does(make_fake_llm: MakeLLM) -> None:
    app = create_app(make_fake_llm(), ServerSettings())
    thread = app.state.context.engine_thread

    async def break_off() -> None:
        with suppress(asyncio.CancelledError):
            async with app.router.lifespan_context(app):
                assert thread.is_alive
                raise asyncio.CancelledError
        assert len(asyncio.all_tasks()) == 1  # this one

    asyncio.run(break_off())
    assert not thread.is_alive


def test_a_session_has_not_heard_a_round_that_the_server_broke_off(roomy: LoadedModel) -> None:
    llm = LLM.from_loaded(roomy, EngineOptions(kv_budget=2**24))
    body = {"model": "tiny", "session": "town", "agents": LONG_ROUND}
    with serving(llm) as (client, server), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/rounds", json=body)
        wait_until(server, lambda: len(server.engine_thread._dispatcher._live) == len(LONG_ROUND))
        server.engine_thread.hurry()
        agents = answer.result(60).json()["agents"]
    assert [one["error"]["message"] for one in agents] == ["The server is stopping."] * 2
    (warning,) = [one["warning"] for one in agents if "warning" in one]
    assert "has not heard it" in warning
