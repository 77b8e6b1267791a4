"""/v1/responses over HTTP: a second face of chat, which has to say the same."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fake_executor import FakeExecutor
from framework_clients import CLIENTS, PYTHON, run
from scripted import LIKE_DEEPSEEK, LIKE_QWEN, scripted
from serving import chat, serving
from test_chat_calls import PARAMETERS, PLACES
from test_chat_calls import TOOLS as CHAT_TOOLS
from test_server import NEWS
from test_thoughts import ANSWER, SAID
from tiny_models import SPECIALS, VOCAB
from tokendance import LLM
from tokendance.errors import AbortedError
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.server.errors import ApiError
from tokendance.server.protocol import ChatMessage, ChatRequest
from tokendance.server.responses_api.bodies import ResponsesRequest
from tokendance.server.responses_api.kept import KeptAnswer, KeptAnswers
from tokendance.server.settings import ServerSettings

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": name, "parameters": parameters, "strict": False}
    for name, parameters in (("walk", PARAMETERS), ("stay", PLACES))
]
FORMAT = {"format": {"type": "json_schema", "name": "place", "schema": PLACES, "strict": True}}
HEARD: list[dict[str, Any]] = [
    {"role": "user", "content": "hello there"},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
    {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
        {"type": "output_text", "text": "so", "annotations": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "walk", "arguments": "{}"},
    {"type": "function_call", "call_id": "2", "name": "stay", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "walked"},
    {"type": "function_call_output", "call_id": "2", "output": [
        {"type": "input_text", "text": "stayed"}]},
]  # fmt: skip
HEARD_IN_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "so", "tool_calls": [
        {"id": index, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for index, name in (("1", "walk"), ("2", "stay"))]},
    {"role": "tool", "tool_call_id": "1", "content": "walked"},
    {"role": "tool", "tool_call_id": "2", "content": "stayed"},
]  # fmt: skip


def without_model(fake: LoadedModel) -> LLM:
    num_slots = 2000 * 16
    options = EngineOptions(kv_budget=num_slots * fake.shape.kv_bytes_per_token(fake.dtype))
    return LLM.from_loaded(fake, options, executor=FakeExecutor(num_slots, VOCAB, SPECIALS))


@pytest.fixture
def fake_client(fake: LoadedModel) -> Iterator[httpx.Client]:
    with serving(without_model(fake)) as (client, _):
        yield client


def respond(client: httpx.Client, said: Any = "hello there", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "input": said, "temperature": 0, "max_output_tokens": 8, **fields}
    return client.post("/v1/responses", json=body)


def answer(client: httpx.Client, said: Any = "hello there", **fields: Any) -> dict[str, Any]:
    response = respond(client, said, **fields)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def stream(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each named as its data says, and numbered."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for index, event in enumerate(filter(None, response.text.split("\n\n"))):
        name, data = event.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        assert document["sequence_number"] == index
        found.append(document)
    return found


def accumulated(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the deltas of a stream make; what is told at the end of each is the same."""
    items: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        index = event["output_index"]
        if kind == "output_item.added":
            assert not is_open
            assert index == len(items)
            items.append(event["item"])
            is_open = True
            assert event["item"]["status"] == "in_progress"
            continue
        item = items[index]
        assert is_open
        assert index == len(items) - 1
        if kind == "output_item.done":
            done = event["item"]
            assert done["status"] in ("completed", "incomplete")
            assert item | {"status": done["status"]} == done
            items[index] = done
            is_open = False
            continue
        assert event["item_id"] == item["id"]
        match kind:
            case "content_part.added":
                assert item["content"] == []
                item["content"].append(event["part"])
            case "output_text.delta":
                item["content"][event["content_index"]]["text"] += event["delta"]
                item["content"][event["content_index"]]["logprobs"] += event["logprobs"]
            case "output_text.done":
                assert event["text"] == item["content"][0]["text"]
            case "reasoning_text.delta":
                item["content"][event["content_index"]]["text"] += event["delta"]
            case "reasoning_text.done":
                assert event["text"] == item["content"][0]["text"]
            case "content_part.done":
                assert event["part"] == item["content"][0]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert event["arguments"] == item["arguments"]
                assert event["name"] == item["name"]
            case _:
                raise AssertionError(kind)
    assert not is_open
    return items


def ask(client: httpx.Client, said: Any = "hello there", **fields: Any) -> dict[str, Any]:
    """What is answered whole and as a stream, which has to say the same."""
    whole = answer(client, said, **fields)
    events = stream(respond(client, said, stream=True, **fields))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [event["response"]["output"] for event in events[:2]] == [[], []]
    assert kinds[-1] == f"response.{whole['status']}"
    last = events[-1]["response"]
    assert accumulated(events) == last["output"]
    assert nameless(last) == nameless(whole)
    return whole


def nameless(document: dict[str, Any]) -> dict[str, Any]:
    """An answer without ids and times, and without what was reused, which differ each time."""
    text = re.sub(r'"((resp|msg|fc|call|rs)_[0-9a-f]{24})"', r'"\2"', json.dumps(document))
    known: dict[str, Any] = json.loads(text)
    for name in ("created_at", "completed_at"):
        assert known.pop(name) is None or document[name] > 1e9
    del known["usage"]["input_tokens_details"]
    return known


def text_of(document: dict[str, Any]) -> str:
    (message,) = document["output"]
    (part,) = message["content"]
    text: str = part["text"]
    return text


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_an_answer_is_what_chat_says(client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello there"},
    ]
    in_chat = chat(client, messages).json()
    found = ask(client, instructions="Be brief.")
    assert text_of(found) == in_chat["choices"][0]["message"]["content"]
    assert found["object"] == "response"
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["instructions"] == "Be brief."
    assert found["id"].startswith("resp_")
    assert found["output"][0]["id"].startswith("msg_")
    usage = found["usage"]
    assert usage["input_tokens"] == in_chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + 8
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    ended = ask(client, max_output_tokens=200, stop=[text_of(found)[4]], instructions="Be brief.")
    assert ended["status"] == "completed"
    assert ended["incomplete_details"] is None
    assert text_of(ended) == text_of(found)[:4].split(text_of(found)[4])[0]


def test_items_are_the_messages_that_they_stand_for(client: httpx.Client) -> None:
    in_chat = chat(client, HEARD_IN_CHAT, tools=CHAT_TOOLS).json()
    found = answer(client, HEARD, tools=TOOLS)
    assert found["usage"]["input_tokens"] == in_chat["usage"]["prompt_tokens"]
    assert text_of(found) == in_chat["choices"][0]["message"]["content"]
    parts = [{"type": "input_text", "text": "hello "}, {"type": "input_text", "text": "there"}]
    easy = answer(client, [{"role": "user", "content": parts}])
    assert text_of(easy) == text_of(answer(client))


def test_calls_over_several_turns(client: httpx.Client) -> None:
    found = ask(client, tools=TOOLS, tool_choice="required", max_output_tokens=300)
    calls = found["output"]
    assert calls
    for call in calls:
        assert call["type"] == "function_call"
        assert call["id"].startswith("fc_")
        assert call["call_id"].startswith("call_")
        places = {"walk": ("pub", "park"), "stay": ("here",)}[call["name"]]
        assert json.loads(call["arguments"])["where"] in places
    outputs = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
        for call in calls
    ]
    question = {"role": "user", "content": "hello there"}
    all_sent = answer(client, [question, *calls, *outputs], tools=TOOLS)
    remembered = answer(client, outputs, tools=TOOLS, previous_response_id=found["id"])
    assert nameless(remembered)["output"] == nameless(all_sent)["output"]
    assert remembered["usage"]["input_tokens"] == all_sent["usage"]["input_tokens"]
    # The first prompt with its answer is there already.
    details = remembered["usage"]["input_tokens_details"]
    assert details["cached_tokens"] > found["usage"]["input_tokens"]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "walk"},
        {"type": "allowed_tools", "mode": "required", "tools": [
            {"type": "function", "name": "walk"}]},
    ],
)  # fmt: skip
def test_a_function_that_is_chosen(client: httpx.Client, choice: dict[str, Any]) -> None:
    found = ask(client, tools=TOOLS, tool_choice=choice, max_output_tokens=200)
    assert {call["name"] for call in found["output"]} == {"walk"}
    assert found["tool_choice"] == choice
    assert [tool["name"] for tool in found["tools"]] == ["walk", "stay"]


def test_a_call_that_is_cut_off(client: httpx.Client) -> None:
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "walk"}}
    found = ask(client, max_output_tokens=45, **fields)
    assert found["status"] == "incomplete"
    assert found["output"][-1]["status"] == "incomplete"
    for item in found["output"]:
        assert item["type"] == "function_call" or item["content"][0]["text"] == ""


def test_formats(client: httpx.Client) -> None:
    found = ask(client, text=FORMAT, max_output_tokens=100)
    assert json.loads(text_of(found)) == {"where": "here"}
    assert found["text"]["format"]["name"] == "place"
    any_object = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=300)
    assert text_of(any_object).startswith("{")
    plain = ask(client, text={"format": {"type": "text"}, "verbosity": "low"})
    assert text_of(plain) == text_of(answer(client))
    both = ask(client, text=FORMAT, tools=TOOLS, max_output_tokens=200, tool_choice="required")
    assert {item["type"] for item in both["output"]} == {"function_call"}
    heard = ask(client, HEARD, text=FORMAT, tools=TOOLS, max_output_tokens=200)
    if heard["output"][0]["type"] == "message":
        assert json.loads(text_of(heard)) == {"where": "here"}


def test_logprobs(client: httpx.Client) -> None:
    found = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = found["output"][0]["content"][0]["logprobs"]
    in_chat = chat(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert entries == in_chat["content"]
    assert len(entries) == 8
    assert answer(client)["output"][0]["content"][0]["logprobs"] == []


def test_what_says_nothing_is_taken(client: httpx.Client) -> None:
    plain = text_of(answer(client))
    absent = (
        "instructions background conversation prompt include max_tool_calls metadata "
        "parallel_tool_calls previous_response_id reasoning store text stream stream_options "
        "tool_choice tools top_logprobs truncation user service_tier safety_identifier "
        "prompt_cache_key top_p"
    )
    neutral: dict[str, Any] = dict.fromkeys(absent.split())
    assert text_of(answer(client, **neutral)) == plain
    taken = {
        "background": False, "include": ["reasoning.encrypted_content"], "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto", "context": "auto"}, "top_logprobs": 0,
        "truncation": "auto", "user": "me", "service_tier": "auto", "prompt_cache_key": "k",
        "stream_options": {"include_obfuscation": False}, "max_tool_calls": 3, "store": True,
    }  # fmt: skip
    found = answer(client, **taken)
    assert text_of(found) == plain
    assert found["metadata"] == {"a": "b"}


def with_item(**item: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "a"}, item]}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' is not supported. This"),
        ({"tools": [TOOLS[0], {"type": "mcp", "server_label": "a"}]}, "tools.1", "'mcp' is not"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools.0",
         "'code_interpreter' is not supported. This server runs no tools of its own."),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search' is not"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "not among the tools"),
        ({"background": True}, "background", "Wait for the answer, or stream it."),
        ({"conversation": "c"}, "conversation", "Use previous_response_id."),
        ({"prompt": {"id": "p"}}, "prompt", "Send its text as instructions."),
        ({"colour": 1}, "colour", "colour is not supported. Leave it out."),
        ({"input": []}, "input", "There is nothing to answer."),
        ({"input": None}, "input", "There is nothing to answer."),
        ({"input": 3}, "input", "valid string"),
        ({"n": 2}, "n", "less than or equal to 1"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "a schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": {
            "type": "string", "format": "path"}}}}, "text.format", "path"),
        (with_item(role="user", content=[{"text": "a"}]), "input.1.content", "without a type"),
        ({"text": FORMAT, "response_format": {"type": "json_object"}}, "text.format", "either"),
        ({"continue_final_message": True}, "input", "assistant"),
        (with_item(type="computer_call"), "input.1", "'computer_call', which is not supported"),
        (with_item(role="user", content=[{"type": "input_image", "image_url": "a"}]),
         "input.1.content", "'input_image', and this model reads text only"),
        (with_item(type="function_call", arguments="{}"), "input.1.name", "required"),
        (with_item(role="stranger", content="a"), "input.1.role", "'user'"),
        ({"input": "a" * 5000}, "input", "context"),
        ({"input": "a" * 1_000_000}, "input", "characters"),
        ({"min_tokens": 9}, "min_tokens", "more than max_output_tokens"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    client: httpx.Client, fields: dict[str, Any], param: str, text: str
) -> None:
    error = error_of(respond(client, **{"said": "hello", **rename(fields)}))
    assert error["param"] == param
    assert text in error["message"]


def test_items_that_are_remembered_can_be_referred_to(client: httpx.Client) -> None:
    first = answer(client, HEARD)
    listed = client.get(f"/v1/responses/{first['id']}/input_items?order=asc").json()
    ids = [item["id"] for item in [*listed["data"], *first["output"]]]
    assert len(set(ids)) == len(HEARD) + 1
    assert {"rs_1", "msg_1", "fc_1"} <= set(ids)  # those that they came with
    question = {"role": "user", "content": "and then?"}
    references = [{"type": "item_reference", "id": one} for one in ids]
    references[0] = {"id": ids[0]}  # as OpenAI's may be
    by_id = answer(client, [*references, question])
    whole = answer(client, [*HEARD, *first["output"], question])
    after = answer(client, [question], previous_response_id=first["id"])
    assert by_id["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert by_id["usage"]["input_tokens"] == after["usage"]["input_tokens"]
    assert text_of(by_id) == text_of(whole)
    # What was referred to is there as long as an answer that has it is.
    assert client.delete(f"/v1/responses/{first['id']}").status_code == 200
    assert answer(client, [references[1], question])["output"]
    for document in (by_id, whole):
        assert client.delete(f"/v1/responses/{document['id']}").status_code == 200
    for one in (ids[-1], "msg_unknown"):
        error = error_of(respond(client, [{"type": "item_reference", "id": one}]), 404)
        assert (error["param"], error["code"]) == ("input", "item_not_found")
        assert one in error["message"]


def test_what_is_referred_to_counts_as_sent(client: httpx.Client) -> None:
    """A few bytes must not stand for gigabytes."""
    thought = {"type": "reasoning_text", "text": "x" * 50_000}
    question = {"role": "user", "content": "And now?"}
    first = {"type": "reasoning", "summary": [], "content": [thought]}
    kept = client.get(f"/v1/responses/{answer(client, [first, question])['id']}/input_items").json()
    (item,) = [one for one in kept["data"] if one["type"] == "reasoning"]
    again = [{"id": item["id"]}] * 200
    error = error_of(respond(client, [*again, question]), 413)
    assert "Refer to fewer" in error["message"]
    assert answer(client, [*again[:3], question])["output"]


def test_items_of_other_tenants_are_not_found() -> None:
    kept = KeptAnswers(ServerSettings())
    item = {"id": "msg_1", "type": "message", "role": "user", "content": []}
    for number, tenant in enumerate(("a", "a", "b")):
        document = {"output": [{**item, "id": f"out_{number}"}]}
        answered = KeptAnswer(document, [], None, 1, [{**item, "content": [number]}])
        kept.keep(tenant, f"resp_{number}", answered)
    assert kept.items("a", ["msg_1"])["msg_1"]["content"] == [1]  # the last of that id
    assert kept.items("b", ["msg_1"])["msg_1"]["content"] == [2]
    assert kept.items("a", ["out_0"])["out_0"]["id"] == "out_0"
    kept.forget("a", "resp_1")
    assert kept.items("a", ["msg_1"])["msg_1"]["content"] == [0]  # another has it, too
    kept.forget("a", "resp_0")
    for tenant, item_id in (("a", "msg_1"), ("a", "out_1"), ("a", "out_2"), ("c", "msg_1")):
        with pytest.raises(ApiError, match="not found"):
            kept.items(tenant, [item_id])[item_id]


def test_items_of_an_input_are_listed_in_pages(fake_client: httpx.Client) -> None:
    said = [{"role": "user", "content": f"part {number}"} for number in range(25)]
    said[3]["role"] = "assistant"
    found = answer(fake_client, said)
    url = f"/v1/responses/{found['id']}/input_items"
    whole = fake_client.get(url, params={"order": "asc", "limit": 100}).json()
    assert (whole["object"], whole["has_more"]) == ("list", False)
    texts = [item["content"][0]["text"] for item in whole["data"]]
    assert texts == [item["content"] for item in said]
    kinds = [item["content"][0]["type"] for item in whole["data"]]
    assert [kind == "output_text" for kind in kinds] == [number == 3 for number in range(25)]
    assert all(item["status"] == "completed" for item in whole["data"])
    first = fake_client.get(url).json()  # twenty, the last first
    assert first["data"] == whole["data"][:4:-1]
    assert (first["first_id"], first["last_id"]) == (
        whole["data"][-1]["id"],
        whole["data"][5]["id"],
    )
    assert first["has_more"]
    rest = fake_client.get(url, params={"after": first["last_id"]}).json()
    assert (rest["data"], rest["has_more"]) == (whole["data"][4::-1], False)
    none = fake_client.get(url, params={"after": rest["last_id"]}).json()
    assert none == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    assert error_of(fake_client.get(url, params={"after": "x"}))["param"] == "after"
    assert fake_client.get(url, params={"limit": 0}).status_code == 400
    assert error_of(fake_client.get("/v1/responses/x/input_items"), 404)
    text = answer(fake_client, "hello")
    (item,) = fake_client.get(f"/v1/responses/{text['id']}/input_items").json()["data"]
    assert item["content"] == [{"type": "input_text", "text": "hello"}]


def test_fields_of_chat_mean_the_same(client: httpx.Client) -> None:
    """All that chat knows is taken, as it is there."""
    left_out = {"model", "messages", "stream", "max_tokens"}
    taken = ResponsesRequest.model_fields.keys() | left_out
    assert ChatRequest.model_fields.keys() <= taken
    said = [{"role": "user", "content": "hello there"}]
    unfinished = [*said, {"role": "assistant", "content": "so"}]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (said, {"min_p": 0.3, "top_k": 5, "seed": 3, "temperature": 1.5}),
        (said, {"repetition_penalty": 1.9, "frequency_penalty": 1.0, "presence_penalty": -1.0}),
        (said, {"logit_bias": {"70": 100.0}, "stop": ["CC"], "include_stop_str_in_output": True}),
        (said, {"min_tokens": 8, "stop_token_ids": [70], "ignore_eos": True}),
        (said, {"structured_outputs": {"choice": ["yes", "no"]}}),
        (said, {"guided_regex": "[ab]{3}"}),
        (said, {"response_format": {"type": "json_object"}, "max_completion_tokens": 40}),
        (said, {"cache_salt": "s", "private": "isolated", "reuse": "exact"}),
        (said, {"modalities": ["text"], "reasoning_effort": "low", "verbosity": "low"}),
        (said, {"add_generation_prompt": False}),
        (unfinished, {"continue_final_message": True}),
    ]
    for messages, fields in cases:
        there = chat(client, messages, **{"temperature": 0, "max_tokens": 8, **fields}).json()
        here = answer(client, messages, **fields)
        assert text_of(here) == there["choices"][0]["message"]["content"], fields
        assert here["usage"]["input_tokens"] == there["usage"]["prompt_tokens"]
    shown = {"return_token_ids": True, "prompt_logprobs": 1}
    there = chat(client, said, temperature=0, max_tokens=8, **shown).json()
    scores = there["prompt_logprobs"]
    for here in (
        answer(client, said, **shown),
        stream(respond(client, said, stream=True, return_token_ids=True))[-1]["response"],
    ):
        assert here["prompt_token_ids"] == there["prompt_token_ids"]
        assert here["token_ids"] == there["choices"][0]["token_ids"]
        assert len(here.get("prompt_logprobs", scores)) == len(scores)
    assert "prompt_logprobs" not in here


def rename(fields: dict[str, Any]) -> dict[str, Any]:
    return {("said" if name == "input" else name): value for name, value in fields.items()}


def test_limits_and_headers(fake: LoadedModel) -> None:
    with serving(without_model(fake), max_messages=3) as (client, _):
        said = [{"role": "user", "content": "a"}] * 4
        assert error_of(respond(client, said), 413)["param"] == "input"
        long = respond(client, max_output_tokens=100_000, stop=["a", "b", "c"])
        assert int(long.headers["x-tokendance-max-tokens"]) < 4096
        unheld = {"type": "object", "properties": {"a": {"type": "string", "format": "path"}}}
        tools = [{"type": "function", "name": "walk", "parameters": unheld}]
        assert "path" in respond(client, tools=tools).headers["x-tokendance-not-held"]
        strict = [tools[0] | {"strict": True}]
        assert error_of(respond(client, tools=strict))["param"] == "tools"


def test_an_error_ends_a_stream(fake: LoadedModel) -> None:
    llm = without_model(fake)
    with serving(llm) as (client, _):
        llm.executor.fail = AbortedError("it has stopped")  # type: ignore[attr-defined]
        *_, last = stream(respond(client, stream=True))
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["message"]
        assert respond(client).status_code == 200


@pytest.mark.parametrize("template", [LIKE_QWEN, LIKE_DEEPSEEK])
def test_thoughts_are_items_of_their_own(template: str) -> None:
    said = ANSWER if template is LIKE_QWEN else ANSWER.removeprefix("<think>\n")
    llm, executor = scripted(lambda _: said, template)
    with serving(llm) as (client, _):
        found = ask(client, max_output_tokens=90)
        thoughts, message = found["output"]
        assert thoughts["type"] == "reasoning"
        assert thoughts["summary"] == []
        assert thoughts["content"] == [{"type": "reasoning_text", "text": SAID.thought}]
        assert message["content"][0]["text"] == SAID.text
        num_thoughts = len(said.partition("</think>")[0]) + len("</think>")
        assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": num_thoughts}
        # Who goes on hears what was said, by whichever way it comes.
        answer(client, "and now?", previous_response_id=found["id"])
        items = [{"role": "user", "content": "hello there"}, *found["output"]]
        answer(client, [*items, {"role": "user", "content": "and now?"}])
        remembered, sent = executor.prompts[-2:]
        assert remembered == sent
        assert SAID.text in sent
        assert SAID.thought not in sent
        shared = ask(client, max_output_tokens=90, share_reasoning=True)
        assert text_of(shared).startswith("<think>\n")
        cut = ask(client, max_output_tokens=12)
        assert [item["type"] for item in cut["output"]] == ["reasoning"]
        assert cut["output"][0]["status"] == "incomplete"


def test_a_round_is_found_among_responses(client: httpx.Client) -> None:
    """Who reads the same words in another place reuses them, as in chat."""
    for name in ("Ann", "Roberta"):
        found = answer(client, NEWS * 3, instructions=f"You are {name}.")
    details = found["usage"]["input_tokens_details"]
    assert details["cached_tokens"] > 100
    assert details["approximate_tokens"] > 64
    exact = answer(client, NEWS * 3, instructions="You are Bo.", reuse="exact")
    assert exact["usage"]["input_tokens_details"]["approximate_tokens"] == 0
    named = {"id": "r", "size": 1, "agent": "ann"}
    assert answer(client, round=named)["status"] == "incomplete"


def test_going_on_from_an_answer(client: httpx.Client) -> None:
    first = answer(client, instructions="Be brief.")
    second = answer(client, "and now?", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    third = answer(
        client, "and then?", previous_response_id=second["id"], instructions="Be verbose."
    )
    messages = [
        {"role": "system", "content": "Be verbose."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "and then?"},
    ]
    in_chat = chat(client, messages).json()
    assert third["usage"]["input_tokens"] == in_chat["usage"]["prompt_tokens"]
    assert text_of(third) == in_chat["choices"][0]["message"]["content"]
    # A stream is remembered, too, and can be looked at.
    *_, last = stream(respond(client, stream=True))
    assert client.get(f"/v1/responses/{last['response']['id']}").json() == last["response"]


def test_who_does_not_want_to_be_remembered(fake_client: httpx.Client) -> None:
    found = answer(fake_client, store=False)
    assert found["store"] is False
    gone = error_of(respond(fake_client, previous_response_id=found["id"]))
    assert gone["code"] == "previous_response_not_found"
    assert gone["param"] == "previous_response_id"
    assert "not found" in gone["message"]
    error_of(fake_client.get(f"/v1/responses/{found['id']}"), 404)
    stored = answer(fake_client)
    assert answer(fake_client, previous_response_id=stored["id"], store=False)["id"]


def test_answers_are_forgotten_on_request(fake_client: httpx.Client) -> None:
    url = f"/v1/responses/{answer(fake_client)['id']}"
    assert fake_client.get(url).json()["status"] == "incomplete"
    assert fake_client.delete(url).json() == {
        "id": url.rpartition("/")[2], "object": "response", "deleted": True,
    }  # fmt: skip
    error_of(fake_client.get(url), 404)
    error_of(fake_client.delete(url), 404)


def test_tenants_share_no_answers(fake: LoadedModel) -> None:
    with serving(without_model(fake), api_keys=("one", "two")) as (client, _):
        client.headers["authorization"] = "Bearer one"
        found = answer(client)
        url = f"/v1/responses/{found['id']}"
        client.headers["authorization"] = "Bearer two"
        for attempt in (client.get(url), client.delete(url)):
            error_of(attempt, 404)
        unknown = error_of(respond(client, previous_response_id=found["id"]))
        never = error_of(respond(client, previous_response_id=found["id"][:-1] + "z"))
        assert unknown["message"].replace(found["id"], "") == never["message"].replace(
            found["id"][:-1] + "z", ""
        )
        client.headers["authorization"] = "Bearer one"
        assert client.get(url).status_code == 200
        del client.headers["authorization"]
        assert client.get(url).status_code == 401
        assert respond(client).status_code == 401


def kept(*, num_bytes: int = 10, previous_id: str | None = None, text: str = "") -> KeptAnswer:
    return KeptAnswer(
        {"id": text, "output": []}, [ChatMessage(role="user", content=text)], previous_id, num_bytes
    )


def names(memory: KeptAnswers, tenant: str = "") -> list[str]:
    return list(memory._tenants[tenant].answers)


def test_memory_is_bounded() -> None:
    memory = KeptAnswers(ServerSettings(max_responses=3))
    for name in "abcd":
        memory.keep("", name, kept())
    assert names(memory) == ["b", "c", "d"]
    memory.get("", "b")
    memory.keep("", "e", kept())
    assert names(memory) == ["d", "b", "e"]
    memory.keep("other", "f", kept())
    assert names(memory) == ["d", "b", "e"]

    small = KeptAnswers(ServerSettings(max_responses_size=25))
    for name in "abc":
        small.keep("", name, kept())
    assert names(small) == ["b", "c"]
    small.keep("", "large", kept(num_bytes=26))
    assert names(small) == []
    small.keep("", "d", kept())
    assert names(small) == ["d"]
    none = KeptAnswers(ServerSettings(max_responses=0))
    none.keep("", "a", kept())
    assert names(none) == []


def test_what_an_answer_goes_on_from_is_forgotten_later() -> None:
    memory = KeptAnswers(ServerSettings(max_responses=3))
    memory.keep("", "a", kept(text="1"))
    memory.keep("", "b", kept(text="2", previous_id="a"))
    memory.keep("", "x", kept())
    memory.keep("", "c", kept(text="3", previous_id="b"))
    assert sorted(names(memory)) == ["a", "b", "c"]
    assert [message.content for message in memory.messages("", "c")] == ["1", "2", "3"]


@pytest.mark.frameworks
@pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-frameworks: run make frameworks")
def test_openais_own_sdk_reads_it(client: httpx.Client) -> None:
    ended = run(CLIENTS / "openai_responses.py", str(client.base_url))
    assert json.loads(ended.splitlines()[-1]) == "all is well"
