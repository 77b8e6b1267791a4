"""What a chat request wants of its answer: calls of tools, JSON of a schema, or any text."""

from collections.abc import Sequence

from tokendance.server.answer_grammar import FORMAT_PARAM, Calls, NamedSchema, Wanted
from tokendance.server.errors import bad_request
from tokendance.server.protocol import AllowedTools, ChatRequest, NamedTool, ResponseFormat, Tool


def wanted_of(body: ChatRequest) -> Wanted | None:
    """What the answer has to look like; None for any text.

    With tools and a format, the answer is calls, or what the format says. Where calls are required,
    it is nothing but calls, until the tools have answered; then it is what the format says.

    Raises:
        ApiError: for a tool that is missing, or a format without its schema.
    """
    answer = None if body.response_format is None else _format_schema(body.response_format)
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
