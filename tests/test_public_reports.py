"""What users of other servers have reported, tried here."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import HELLO, chat, events, serving
from tiny_models import VOCAB
from tokendance import LLM
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions

WALK = {"name": "walk", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WALK}]
TEXT = "The baker says that bread is out until noon."


@pytest.fixture(scope="module")
def client(model_folder: Callable[..., Path]) -> Iterator[httpx.Client]:
    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    with serving(LLM.from_loaded(model, EngineOptions(kv_budget=2**25))) as (client, _):
        yield client


def called(arguments: str | None) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "walk", "arguments": arguments}}
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "walked"},
    ]


@pytest.mark.parametrize("arguments", ["[1]", '"pub"', "7", "null", "no JSON {", "", None])
def test_a_call_in_the_history_whose_arguments_are_no_object(
    client: httpx.Client, arguments: str | None
) -> None:
    for fields in ({"tools": TOOLS}, {}):
        assert chat(client, called(arguments), **fields).status_code == 200


def test_a_late_system_message_is_heard(client: httpx.Client) -> None:
    late = [
        *HELLO,
        {"role": "assistant", "content": "a"},
        {"role": "system", "content": "Whisper."},
    ]
    answers = [
        chat(client, [*late, *HELLO]),
        chat(client, late),
        chat(client, [*late[:2], *HELLO]),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    lengths = [answer.json()["usage"]["prompt_tokens"] for answer in answers]
    assert lengths[0] - lengths[2] == len("Ssystem\nWhisper.E\n")


def test_the_answer_of_a_tool_is_missing(client: httpx.Client) -> None:
    messages = called('{"to": "pub"}')
    for some in (messages[:2], [*messages[:2], *HELLO], [messages[0], messages[2]], messages[2:]):
        assert chat(client, some, tools=TOOLS).status_code == 200


def test_thirty_tools_with_long_texts(client: httpx.Client) -> None:
    text = {"type": "string", "maxLength": 2000, "minLength": 1}
    tools = [
        {"type": "function", "function": {
            "name": f"walk_{number}", "strict": True,
            "parameters": {"type": "object", "properties": {"to": text}, "required": ["to"],
                           "additionalProperties": False}}}
        for number in range(30)
    ]  # fmt: skip
    answer = chat(client, tools=tools[:3], tool_choice="required", max_tokens=200, temperature=1)
    for call in answer.json()["choices"][0]["message"]["tool_calls"]:
        assert 1 <= len(json.loads(call["function"]["arguments"])["to"]) <= 2000
    # All of them do not fit this model's context, one token a character; the grammar holds them.
    answer = chat(client, tools=tools, tool_choice="required", max_tokens=10)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("where", ["content", "name", "tool", "stop", "prompt", "schema"])
def test_a_lone_surrogate_is_refused_or_taken(client: httpx.Client, where: str) -> None:
    """JSON can spell half a character; no answer is an error of the server."""
    half = "\\ud800"
    body = {
        "content": f'{{"model": "tiny", "messages": [{{"role": "user", "content": "a{half}"}}]',
        "name": '{"model": "tiny", "messages": [{"role": "user", "content": "a", '
        f'"name": "b{half}"}}]',
        "tool": '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": '
        f'[{{"type": "function", "function": {{"name": "f", "description": "{half}"}}}}]',
        "stop": '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], '
        f'"stop": ["{half}"]',
        "prompt": f'{{"model": "tiny", "prompt": "a{half}"',
        "schema": '{"model": "tiny", "input": "a", "tool_choice": "none", "tools": [{"type": '
        f'"function", "name": "f", "parameters": {{"description": "{half}"}}}}]',
    }[where]
    paths = {"prompt": "/v1/completions", "schema": "/v1/responses"}
    path = paths.get(where, "/v1/chat/completions")
    headers = {"content-type": "application/json"}
    response = client.post(path, content=f'{body}, "max_tokens": 4}}', headers=headers)
    assert response.status_code in (200, 400), response.text
    if where == "schema":
        assert response.json()["tools"][0]["parameters"] == {"description": "\ud800"}
    if where in ("content", "name", "prompt"):
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert "surrogate" in message or "unicode" in message


def test_a_stop_text_beside_the_models_own_end(client: httpx.Client) -> None:
    """Whichever comes first ends the answer, and neither is part of it."""
    letters = {str(token): -100.0 for token in range(97, VOCAB)}  # and the model's own end
    fields = {"max_tokens": 20, "temperature": 1, "logit_bias": letters}
    for seed in range(8):
        whole = chat(client, seed=seed, ignore_eos=True, **fields).json()["choices"][0]
        text = whole["message"]["content"]
        stop = text[5:7]
        ended = chat(client, seed=seed, stop=[stop, "<|end|>"], **fields).json()["choices"][0]
        content = ended["message"]["content"]
        assert text.startswith(content)
        assert stop not in content
        assert ended["finish_reason"] == "stop"
        stream = events(chat(client, seed=seed, stop=[stop, "<|end|>"], stream=True, **fields))
        sent = [event["choices"][0]["delta"].get("content", "") for event in stream]
        assert "".join(sent) == content


def test_log_probabilities_have_all_bytes(client: httpx.Client) -> None:
    """Whatever bytes a model says, also halves of characters."""
    for seed in range(4):
        fields = {"max_tokens": 60, "temperature": 1, "seed": seed, "ignore_eos": True}
        bias = {str(token): 6.0 for token in range(190, 259)}  # bytes that begin or go on
        bias |= {str(token): -100.0 for token in range(259, VOCAB)}  # special ones are no text
        whole = chat(client, logprobs=True, logit_bias=bias, **fields).json()["choices"][0]
        data = bytes(byte for entry in whole["logprobs"]["content"] for byte in entry["bytes"])
        # Tokenizers differ in how many marks they set for bytes that are no character.
        text = data.decode(errors="ignore")
        assert text == whole["message"]["content"].replace("\ufffd", "")


def test_the_same_body_has_the_same_answer(client: httpx.Client) -> None:
    fields = {"max_tokens": 24, "ignore_eos": True}
    messages = [{"role": "user", "content": TEXT * 3}]
    answers = [chat(client, messages, **fields).json()["choices"] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_exact_answers_are_the_same_whoever_asks_at_once(client: httpx.Client) -> None:
    """44 bodies that share text, five times at once; what is reused differs from time to time."""
    bodies = [
        [
            {"role": "system", "content": f"You are agent {number}." + "x" * number},
            {"role": "user", "content": TEXT * 2},
        ]
        for number in range(44)
    ]

    def ask(messages: list[dict[str, str]]) -> str:
        response = chat(client, messages, reuse="exact", max_tokens=6, ignore_eos=True)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    with ThreadPoolExecutor(44) as pool:
        times = [list(pool.map(ask, bodies)) for _ in range(5)]
    assert all(one == times[0] for one in times)
    assert len(set(times[0])) > 1
