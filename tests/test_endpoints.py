"""The documents of answers, exactly: what is null, and what is left out. Without a model."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tokendance.errors import BudgetError
from tokendance.executor.step import TokenLogprobs
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import Output
from tokendance.server.chat import ChatEndpoint
from tokendance.server.completions import CompletionEndpoint
from tokendance.server.context import ServerContext
from tokendance.server.jobs import Delta
from tokendance.server.protocol import ChatRequest, CompletionRequest
from tokendance.server.respond import Answer, usage_of
from tokendance.server.responses import dump
from tokendance.server.rounds import _entry
from tokendance.server.tool_format import ToolFormat

NO_THOUGHTS = cast(
    PromptEncoder, SimpleNamespace(thought_marks=None, thought_parser=lambda _: None)
)
CONTEXT = cast(
    ServerContext,
    SimpleNamespace(
        check_model=lambda _: None,
        encoder=lambda *_: NO_THOUGHTS,
        head=lambda kind: {"id": kind, "created": 0, "model": "tiny"},
        tools=ToolFormat(),
        token_text=chr,
        token_bytes=lambda token: chr(token).encode(),
    ),
)
HEAD = {"id": "chatcmpl", "object": "chat.completion", "created": 0, "model": "tiny"}
CHUNK_HEAD = HEAD | {"object": "chat.completion.chunk"}
TEXT_HEAD = HEAD | {"id": "cmpl", "object": "text_completion"}
TOOLS = [{"type": "function", "function": {"name": "walk"}}]
CALL = '<tool_call>\n{"name": "walk", "arguments": {}}\n</tool_call>'


def output(text: str, reason: str = "stop", **fields: Any) -> Output:
    found: dict[str, Any] = {
        "agent": "",
        "text": text,
        "token_ids": tuple(map(ord, text)),
        "finish_reason": reason,
        "error": None,
        "prompt_token_ids": np.zeros(4, np.int32),
        "prompt_tokens": 4,
        "computed_tokens": 1,
        "reused_tokens": 3,
        "corrected_tokens": 0,
    }
    return Output(**found | fields)


def chat(**fields: Any) -> ChatEndpoint:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **fields}
    return ChatEndpoint(CONTEXT, "", ChatRequest.model_validate(body))


def whole(endpoint: ChatEndpoint | CompletionEndpoint, *answers: Answer) -> dict[str, Any]:
    usage = usage_of([answer.output for answer in answers], len(answers))
    return dump(endpoint.document(answers, usage))


def chunks(endpoint: ChatEndpoint | CompletionEndpoint, *deltas: Delta) -> list[dict[str, Any]]:
    return [dump(chunk) for delta in deltas for chunk in endpoint.chunks(delta)]


USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 2,
    "total_tokens": 6,
    "prompt_tokens_details": {"cached_tokens": 3, "approximate_tokens": 0},
}
LOGPROBS = [TokenLogprobs(-0.5, ((104, -0.5),)), TokenLogprobs(float("-inf"), ())]
CHAT_LOGPROBS = {
    "content": [
        {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": [
            {"token": "h", "logprob": -0.5, "bytes": [104]}]},
        {"token": "i", "logprob": -9999.0, "bytes": [105], "top_logprobs": []},
    ],
    "refusal": None,
}  # fmt: skip


def test_a_conversations_answer() -> None:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hi"},
        "logprobs": None,
        "finish_reason": "length",
    }
    answer = Answer(output("hi", "length"), LOGPROBS)
    assert whole(chat(), answer) == HEAD | {"choices": [choice], "usage": USAGE}
    asked = whole(chat(logprobs=True), answer)
    assert asked["choices"] == [choice | {"logprobs": CHAT_LOGPROBS}]


def test_a_conversations_answer_with_a_call() -> None:
    document = whole(chat(tools=TOOLS), Answer(output(CALL), []))
    (choice,) = document["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "walk", "arguments": "{}"}}
    no_call = whole(chat(tools=TOOLS), Answer(output("hi"), []))
    assert no_call["choices"][0]["message"] == {"role": "assistant", "content": "hi"}


def test_a_conversations_stream() -> None:
    def choice(delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        chosen = {"index": 1, "delta": delta, "finish_reason": None, **fields}
        return CHUNK_HEAD | {"choices": [chosen]}

    deltas = [Delta(1, "h", (104,)), Delta(1, "", (105,)), Delta(1, "i", output=output("hi"))]
    begin = choice({"role": "assistant", "content": ""})
    assert chunks(chat(), *deltas) == [
        begin,
        choice({"content": "h"}),
        choice({"content": "i"}),
        choice({}, finish_reason="stop"),
    ]
    logprobs = Delta(1, "hi", (104, 105), tuple(LOGPROBS))
    assert chunks(chat(logprobs=True), logprobs) == [
        begin,
        choice({"content": "hi"}, logprobs=CHAT_LOGPROBS),
    ]
    assert dump(chat().usage_chunk(usage_of([output("hi")], 1))) == CHUNK_HEAD | {
        "choices": [], "usage": USAGE,
    }  # fmt: skip


def test_a_conversations_stream_with_a_call() -> None:
    endpoint = chat(tools=TOOLS)
    stream = chunks(endpoint, Delta(0, CALL[:9], (1,)), Delta(0, CALL[9:], output=output(CALL)))
    begin, called, more, end = [document["choices"][0] for document in stream]
    assert begin["delta"] == {"role": "assistant", "content": ""}
    (call,) = called["delta"].pop("tool_calls")
    assert called == {"index": 0, "delta": {}, "finish_reason": None}
    assert call.pop("id").startswith("call_")
    assert call == {
        "index": 0, "type": "function", "function": {"name": "walk", "arguments": ""},
    }  # fmt: skip
    added = {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
    assert more == {"index": 0, "delta": added, "finish_reason": None}
    assert end == {"index": 0, "delta": {}, "finish_reason": "tool_calls"}


@pytest.mark.parametrize("end", [3, 11, 20, 40, 48, len(CALL)])
def test_a_call_that_was_cut_off(end: int) -> None:
    """Its mark is no text, and what there is of its arguments comes, in a stream, too."""
    cut = output(f"I go.\n{CALL}"[: 6 + end], "length")
    whole_answer = whole(chat(tools=TOOLS), Answer(cut, []))["choices"][0]
    message = whole_answer["message"]
    assert message["content"] == "I go." if end > 11 else message["content"] in ("I go.", "I go.\n")
    called = [call["function"] for call in message.get("tool_calls", ())]
    begun = end - CALL.index("{}")
    assert called == [{"name": "walk", "arguments": "{}"[: max(0, begun)]}][: begun > -2]
    is_whole = end == len(CALL)
    assert whole_answer["finish_reason"] == ("tool_calls" if is_whole else "length")
    stream = chunks(
        chat(tools=TOOLS), *[Delta(0, one, (1,)) for one in cut.text], Delta(0, "", output=cut)
    )
    deltas = [document["choices"][0]["delta"] for document in stream]
    assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
    parts = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(part["arguments"] for part in parts) == "".join(
        one["arguments"] for one in called
    )
    assert stream[-1]["choices"][0]["finish_reason"] == whole_answer["finish_reason"]


def test_a_texts_answer() -> None:
    body = CompletionRequest.model_validate({"model": "tiny", "prompt": "a"})
    endpoint = CompletionEndpoint(CONTEXT, "", body)
    choice = {"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}
    plain = Answer(output("hi"), [])
    assert whole(endpoint, plain) == TEXT_HEAD | {"choices": [choice], "usage": USAGE}
    scored = CompletionRequest.model_validate({"model": "tiny", "prompt": "a", "logprobs": 1})
    answer = Answer(output("hi"), LOGPROBS[:1] * 2)
    (asked,) = whole(CompletionEndpoint(CONTEXT, "", scored), answer)["choices"]
    assert asked["logprobs"] == {
        "tokens": ["h", "i"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"h": -0.5}, {"h": -0.5}],
        "text_offset": [0, 1],
    }
    deltas = [Delta(0, "h", (104,)), Delta(0, "", (105,)), Delta(0, "", output=output("hi"))]
    assert chunks(endpoint, *deltas) == [
        TEXT_HEAD | {"choices": [choice | {"text": "h", "finish_reason": None}]},
        TEXT_HEAD | {"choices": [choice | {"text": ""}]},
    ]
    assert dump(endpoint.usage_chunk(usage_of([output("hi")], 1))) == TEXT_HEAD | {
        "choices": [], "usage": USAGE,
    }  # fmt: skip


def test_an_agents_answer() -> None:
    entry = _entry("ann", output("hi"), NO_THOUGHTS, shares=False)
    assert dump(entry) == {
        "agent": "ann",
        "message": {"role": "assistant", "content": "hi"},
        "finish_reason": "stop",
        "usage": USAGE,
    }
    entry.warning = "The round is not on disk."
    assert dump(entry)["warning"] == entry.warning
    error = output("", "error", error=BudgetError("Too long."))
    failed = dump(_entry("ann", error, NO_THOUGHTS, shares=False))
    assert failed["agent"] == "ann"
    assert failed["error"]["message"] == "Too long."
    assert set(failed) == {"agent", "error"}


def test_prompts_are_counted_once_however_many_answers_they_have() -> None:
    usage = usage_of([output("a"), output("b"), output("cd"), output("")], choices=2)
    assert usage.prompt_tokens == 8
    assert usage.completion_tokens == 4
    assert usage.prompt_tokens_details.cached_tokens == 6
