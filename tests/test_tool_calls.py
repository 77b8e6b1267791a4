"""Calls of tools: the format that a chat template has for them, and answers in it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving import chat, serving
from tiny_models import VOCAB, make_tokenizer
from tokendance import LLM, Prompt
from tokendance.errors import PromptError
from tokendance.models.encoder import PromptEncoder
from tokendance.models.loader import load_model
from tokendance.rounds.segments import make_salt
from tokendance.server.jobs import Job
from tokendance.server.tool_format import ToolFormat, find_tool_format

LISTING = "{% if tools %}{% for t in tools %}{{ t['function'] | tojson }}\n{% endfor %}{% endif %}"
MESSAGE = "{{ '<|start|>' + m['role'] + '\n' + m['content'] }}"
END = (
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NAME_ARGUMENTS = """{"name": "{{ c['name'] }}", "%s": {{ c['arguments'] | tojson }}}"""


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
        # Blanks before a call belong to nobody, and a word before it that is always there neither.
        (
            f"{{{{ '\n' }}}}<call>{NAME_ARGUMENTS % 'arguments'}</call>",
            ToolFormat("<call>", "</call>", "arguments", True),
        ),
        (
            f"{{{{ '\n\n' }}}}{NAME_ARGUMENTS % 'parameters'}",
            ToolFormat("", "", "parameters", True),
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


def test_a_template_for_tools_only() -> None:
    tokenizer = make_tokenizer()
    with_tools = template(f"<call>{NAME_ARGUMENTS % 'arguments'}</call>")
    # The second has nothing for conversations without tools, which is not asked for here.
    for others in ({"default": template("", "")}, {"rag": "x"}):
        tokenizer.chat_template = {"tool_use": with_tools, **others}
        found = find_tool_format(PromptEncoder(tokenizer, VOCAB, make_salt()))
        assert found == ToolFormat("<call>", "</call>", "arguments", True)


def test_tools_that_cannot_be_listed() -> None:
    tokenizer = make_tokenizer()
    encoder = PromptEncoder(tokenizer, VOCAB, make_salt())
    said = [{"role": "user", "content": "walk"}]
    tool = {"type": "function", "function": {"name": "walk", "parameters": {"properties": ["a"]}}}
    with pytest.raises(PromptError, match="lists no tools"):
        encoder.encode(Prompt(said, tools=[tool]))
    with pytest.raises(PromptError, match="chat messages"):
        encoder.encode(Prompt("walk", tools=[tool]))
    tokenizer.chat_template = template(
        "",
        "{% for t in tools or [] %}{{ t['function']['parameters']['properties'].a.b }}{% endfor %}",
    )
    with pytest.raises(PromptError, match="refuses"):
        encoder.encode(Prompt(said, tools=[tool]))


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_tools_go_the_way_of_the_chat_template(
    make_llm: Callable[..., LLM], model_folder: Callable[..., Path], key: str
) -> None:
    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    marks = ("[call] ", " [/call]") if key == "arguments" else ("", "")
    model.tokenizer.chat_template = template(marks[0] + NAME_ARGUMENTS % key + marks[1])
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    function = {"name": "walk", "parameters": parameters}
    tool: dict[str, Any] = {"type": "function", "function": function}
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "walk"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "walk", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "walked"},
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "messages": said,
        "tools": [tool],
        "max_tokens": 200,
        "temperature": 1,
    }
    with serving(make_llm(num_pages=2000, model=model)) as (client, server):
        heard: list[str] = []
        submit = server.engine_thread.submit

        def record(jobs: Sequence[Job]) -> None:
            heard.extend(model.tokenizer.decode(job.request.prompt.token_ids) for job in jobs)
            submit(jobs)

        server.engine_thread.submit = record  # type: ignore[method-assign]
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
        # A function may leave its parameters out, and calls may follow words, one upon another.
        fields["tools"] = [{"type": "function", "function": {"name": "walk"}}]
        calls = said[1]["tool_calls"] * 2
        said[1] |= {"content": "I go.", "tool_calls": calls}
        assert chat(client, **fields).status_code == 200
        assert f"<|start|>assistant\nI go.\n{written}\n{written}<|end|>" in heard[-1]
        fields["tools"] = [tool]
        tool["function"]["description"] = "a " * server.max_characters
        refused = chat(client, **fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            400, "context_length_exceeded",
        )  # fmt: skip
        tool["function"]["description"] = "ends <|end|> here"
        refused = chat(client, **fields)
        assert refused.status_code == 400
        assert "special token" in refused.json()["error"]["message"]


def test_options_of_the_chat_template(
    make_llm: Callable[..., LLM], model_folder: Callable[..., Path]
) -> None:
    """Those that it asks for are given to it, and others change nothing."""
    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    plain = model.tokenizer.chat_template
    with serving(make_llm(num_pages=2000, model=model)) as (client, _):

        def length(**fields: Any) -> int:
            response = chat(client, **fields)
            assert response.status_code == 200, response.text
            count: int = response.json()["usage"]["prompt_tokens"]
            return count

        without = length()
        for fields in ({"enable_thinking": False}, {"chat_template_kwargs": {"thinking": True}}):
            assert length(**fields) == without
        model.tokenizer.chat_template = plain + "{% if enable_thinking is false %}abc{% endif %}"
        client_side: list[dict[str, Any]] = [
            {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}},
        ]  # fmt: skip
        # The server's tokenizer is the model's own.
        for fields in client_side:
            assert length(**fields) == without + 3
        assert length(enable_thinking=True) == length() == without
        many: list[dict[str, Any]] = [{"tools": 1}, {"tokenize": True}, {"a": []}, {"a b": 1}]
        for wrong in many:
            refused = chat(client, chat_template_kwargs=wrong)
            assert refused.status_code == 400
            assert "chat_template_kwargs" in refused.json()["error"]["message"]
        refused = chat(client, chat_template_kwargs={"enable_thinking": "<|end|>"})
        assert refused.status_code == 400
        assert "special token" in refused.json()["error"]["message"]
