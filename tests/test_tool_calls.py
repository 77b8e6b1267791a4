"""Calls of tools: the format that a chat template has for them, and answers in it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import VOCAB, make_tokenizer
from serving import chat, serving
from tokendance import LLM
from tokendance.models.encoder import PromptEncoder
from tokendance.models.loader import load_model
from tokendance.rounds.segments import make_salt
from tokendance.server.tool_calls import ToolFormat, find_tool_format
from tokendance.server.worker import Job

LISTING = "{% if tools %}{% for t in tools %}{{ t['function'] | tojson }}\n{% endfor %}{% endif %}"
MESSAGE = "{{ '<|start|>' + m['role'] + '\n' + m['content'] }}"
END = (
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NAME_ARGUMENTS = """{"name": "{{ c['name'] }}", "%s": {{ c['arguments'] | tojson }}}"""


def test_cutting_calls_out_of_an_answer() -> None:
    text = 'I go.\n<tool_call>\n{"name": "walk", "arguments": {"to": "a"}}\n</tool_call>'
    words, calls = ToolFormat().split(text)
    assert words == "I go."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("walk", {"to": "a"})]
    inside = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call> done'
    assert ToolFormat().split(inside)[0] == "done"
    for other in ("no call", "<tool_call> cut off", "<tool_call>[]</tool_call>", "</tool_call>"):
        assert ToolFormat().split(other) == (other, [])


def test_calls_that_are_the_whole_answer() -> None:
    bare = ToolFormat("", "", "parameters")
    words, (call,) = bare.split('{"name": "walk", "parameters": {"to": "a"}}')
    assert (words, call.name, json.loads(call.arguments)) == ("", "walk", {"to": "a"})
    for other in ("", "no call", "a {}", "{ cut", '{"name": "walk", "arguments": {}}'):
        assert bare.split(other) == (other, [])


def template(call: str, listing: str = LISTING) -> str:
    """A chat template that lists tools and writes calls; `c` is a call's function."""
    calls = "{% for t in m['tool_calls'] %}{% set c = t['function'] %}" + call + "{% endfor %}"
    return f"{listing}{{% for m in messages %}}{MESSAGE}{calls}{END}"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            f"[call] {NAME_ARGUMENTS % 'arguments'} [/call]",
            ToolFormat("[call] ", " [/call]", "arguments", True),
        ),
        (NAME_ARGUMENTS % "parameters", ToolFormat("", "", "parameters", True)),
        ("<call><{{ c['name'] }}></call>", ToolFormat()),
        ("", ToolFormat()),
        # A special token does not come out of the model as text.
        (f"<|start|>{NAME_ARGUMENTS % 'arguments'}", ToolFormat()),
        ("{{ raise_exception('no') }}", ToolFormat()),
    ],
)
def test_the_chat_template_says_how_calls_are_written(call: str, expected: ToolFormat) -> None:
    tokenizer = make_tokenizer()
    for listing, found in ((LISTING, expected), ("", ToolFormat())):
        tokenizer.chat_template = template(call, listing)
        assert find_tool_format(PromptEncoder(tokenizer, VOCAB, make_salt())) == found


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_tools_go_the_way_of_the_chat_template(
    make_llm: Callable[..., LLM], model_folder: Callable[..., Path], key: str
) -> None:
    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    marks = ("[call] ", " [/call]") if key == "arguments" else ("", "")
    model.tokenizer.chat_template = template(marks[0] + NAME_ARGUMENTS % key + marks[1])
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "walk", "parameters": parameters}}
    said = [
        {"role": "user", "content": "walk"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "walk", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "walked"},
    ]  # fmt: skip
    fields = {"messages": said, "tools": [tool], "max_tokens": 200, "temperature": 1}
    with serving(make_llm(num_pages=2000, model=model)) as (client, server):
        heard: list[str] = []
        submit = server.worker.submit

        def record(jobs: Sequence[Job], *, announced: bool = False) -> None:
            heard.extend(model.tokenizer.decode(job.request.prompt.token_ids) for job in jobs)
            submit(jobs, announced=announced)

        server.worker.submit = record  # type: ignore[method-assign]
        for choice in ("required", "auto"):
            answer = chat(client, tool_choice=choice, **fields).json()["choices"][0]
            if choice == "required":
                assert answer["finish_reason"] == "tool_calls"
                for call in answer["message"]["tool_calls"]:
                    assert call["function"]["name"] == "walk"
                    assert call["function"]["arguments"] == "{}"
        assert heard[0].startswith('{"name": "walk", "parameters": ')
        assert "You may call" not in heard[0]
        written = marks[0] + json.dumps({"name": "walk", key: {}}) + marks[1]
        assert f"<|start|>assistant\n{written}<|end|>\n<|start|>tool\nwalked" in heard[0]
        tool["function"]["description"] = "ends <|end|> here"  # type: ignore[index]
        refused = chat(client, **fields)
        assert refused.status_code == 400
        assert "special token" in refused.json()["error"]["message"]
