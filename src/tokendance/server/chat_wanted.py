"""What a chat request wants of its answer: calls of tools, JSON of a schema, or any text."""

import json
from collections.abc import Sequence
from typing import Any

from tokendance.server.answer_grammar import FORMAT_PARAM, Calls, NamedSchema, Pattern, Wanted
from tokendance.server.errors import bad_request
from tokendance.server.protocol import (
    AllowedTools,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    PromptRequest,
    ResponseFormat,
    Tool,
)

_STRUCTURED = "structured_outputs"


def wanted_of(body: ChatRequest) -> Wanted | None:
    """What the answer has to look like; None for any text.

    With tools and a format, the answer is calls, or what the format says. Where calls are required,
    it is nothing but calls, until the tools have answered; then it is what the format says.

    Raises:
        ApiError: for a tool that is missing, or a format without its schema.
    """
    answer = _answer_of(body)
    choice = body.tool_choice
    tools = body.tools or []
    if isinstance(choice, NamedTool):
        tools = [_tool(choice, tools)]
    elif isinstance(choice, AllowedTools):
        tools = [_tool(one, tools) for one in choice.allowed_tools.tools]
        choice = choice.allowed_tools.mode
    elif choice == "required" and not tools:
        raise bad_request("tool_choice asks for tools, and there are none.", "tool_choice")
    is_required = choice == "required" or isinstance(choice, NamedTool)
    has_heard_tools = body.messages[-1].role in ("tool", "function")
    if not body.may_call or (is_required and answer is not None and has_heard_tools):
        return None if answer is None else Wanted(answer=answer)
    return Wanted(
        tools=tuple(_parameters(tool) for tool in tools),
        calls=Calls.REQUIRED if is_required else Calls.ALLOWED,
        several=body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        answer=answer,
    )


def wanted_text(body: CompletionRequest) -> Wanted | None:
    """What a continuation has to look like; None for any text."""
    answer = _answer_of(body)
    return None if answer is None else Wanted(answer=answer)


def _answer_of(body: PromptRequest) -> NamedSchema | Pattern | None:
    """What is no call has to look like so; raises ApiError where two things are asked for."""
    answer = None if body.response_format is None else _format_schema(body.response_format)
    outputs = body.structured_outputs
    if outputs is None:
        return answer
    asked = outputs.model_dump(by_alias=True, exclude_none=True)
    if answer is not None or len(asked) != 1:
        message = "An answer looks like one thing: give one of json, regex, choice, json_object."
        raise bad_request(message, _STRUCTURED)
    if outputs.choice is not None:
        if not all(outputs.choice):
            raise bad_request("A choice is an empty text.", _STRUCTURED)
        return Pattern.of_choice(outputs.choice, _STRUCTURED)
    if outputs.regex is not None:
        return Pattern.of_regex(outputs.regex, _STRUCTURED)
    schema: Any = outputs.json_ if outputs.json_ is not None else {"type": "object"}
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict):
        raise bad_request("The schema is no JSON object.", _STRUCTURED)
    return NamedSchema("structured_outputs", schema, strict=False, param=_STRUCTURED)


def _tool(named: NamedTool, tools: Sequence[Tool]) -> Tool:
    """The tool of a name; raises ApiError if there is none."""
    name = named.function.name
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise bad_request(f"tool_choice names {name!r}, which is not among the tools.", "tool_choice")


def _parameters(tool: Tool) -> NamedSchema:
    function = tool.function
    schema = function.parameters or {"type": "object"}
    return NamedSchema(function.name, schema, strict=bool(function.strict), param="tools")


def _format_schema(wanted: ResponseFormat) -> NamedSchema | None:
    match wanted.type:
        case "text":
            return None
        case "json_object":
            schema = {"type": "object"}
            return NamedSchema("response_format", schema, strict=False, param="response_format")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request("json_schema needs a schema.", FORMAT_PARAM)
    schema = wanted.json_schema.schema_
    strict = bool(wanted.json_schema.strict)
    return NamedSchema("response_format", schema, strict=strict, param=FORMAT_PARAM)
