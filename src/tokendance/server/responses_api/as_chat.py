"""Makes a chat request of a body of /v1/responses."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokendance.server.errors import bad_request
from tokendance.server.messages import MessageRole
from tokendance.server.protocol import (
    AllowedToolList,
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionSpec,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)
from tokendance.server.protocol import ToolChoice as ChatToolChoice
from tokendance.server.responses_api.bodies import (
    AllowedFunctions,
    ChosenFunction,
    FunctionTool,
    InputCall,
    InputCallOutput,
    InputMessage,
    InputReasoning,
    Item,
    ReadItem,
    ResponsesRequest,
    TextFormat,
    ToolChoice,
    text_of,
)

# What both have under one name and in one form.
_SAME = (ResponsesRequest.model_fields.keys() & ChatRequest.model_fields.keys()) - {
    "tools",
    "tool_choice",
    "top_logprobs",
    "stream_options",
    "store",
    "metadata",
    "logprobs",
}
# How fields of a chat request are called here, for errors that name them.
_NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
}


def as_chat(body: ResponsesRequest, messages: Sequence[ChatMessage]) -> ChatRequest:
    """The chat request that asks the same.

    Args:
        body: of the request.
        messages: what was said before, and what is new in it; its instructions stand before them.

    Raises:
        ApiError: if nothing was said.
    """
    if body.instructions:
        messages = [ChatMessage(role="system", content=body.instructions), *messages]
    if not messages:
        raise bad_request("There is nothing to answer. Send a text or items as input.", "input")
    fields: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set & _SAME}
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.text is not None and body.text.format is not None:
        if body.response_format is not None:
            raise bad_request("Give either text.format or response_format.", "text.format")
        fields["response_format"] = _format(body.text.format)
    if body.tools is not None:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice)
    return ChatRequest(messages=list(messages), **fields)


def items_of(body: ResponsesRequest) -> list[Item]:
    """What is new in a request."""
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return body.input or []


def messages_of(items: Iterable[ReadItem]) -> list[ChatMessage]:
    """Items as messages; calls go with what was said before them, as they do in one answer.

    Fields of items have been checked, so messages are made without that: there may be thousands.
    """
    messages: list[ChatMessage] = []
    thought: str | None = None  # of the next answer

    def say(role: MessageRole, content: str | None = None, **fields: Any) -> ChatMessage:
        nonlocal thought
        if role == "assistant":
            fields["reasoning_content"], thought = thought, None
        messages.append(ChatMessage.model_construct(role=role, content=content, **fields))
        return messages[-1]

    for item in items:
        match item:
            case InputMessage():
                say(item.role, "".join(text_of(item.content)), name=item.name)
            case InputReasoning():
                thought = "\n".join(text_of(item.content or item.summary)) or None
            case InputCall():
                goes_on = messages and messages[-1].role == "assistant" and thought is None
                said = messages[-1] if goes_on else say("assistant")
                function = FunctionCall.model_construct(name=item.name, arguments=item.arguments)
                call = ToolCall.model_construct(id=item.call_id, function=function)
                if said.tool_calls is None:
                    said.tool_calls = []
                said.tool_calls.append(call)
            case InputCallOutput():
                say("tool", "".join(text_of(item.output)), tool_call_id=item.call_id)
    return messages


def field_here(name: str | None) -> str | None:
    """How a field of the chat request is called in /v1/responses."""
    first, _, rest = (name or "").partition(".")
    return _NAMES.get(name or "", f"input.{rest}" if first == "messages" else name)


def text_here(message: str) -> str:
    """A message of an error, with the names that fields have in /v1/responses."""
    return message.replace("response_format", "text.format").replace(
        "max_tokens", "max_output_tokens"
    )


def _format(wanted: TextFormat) -> ResponseFormat:
    named = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return ResponseFormat(type=wanted.type, json_schema=JsonSchema.model_validate(named))


def _tool(tool: FunctionTool) -> Tool:
    # What is false is left out of the prompt, as in chat, where it is the default.
    fields = tool.model_dump(exclude={"type"}) | {"strict": tool.strict or None}
    function = FunctionSpec(**fields)
    return Tool(type="function", function=function)


def _named(chosen: ChosenFunction) -> NamedTool:
    return NamedTool(type="function", function=NamedFunction(name=chosen.name))


def _choice(choice: ToolChoice) -> ChatToolChoice:
    match choice:
        case ChosenFunction():
            return _named(choice)
        case AllowedFunctions():
            tools = [_named(tool) for tool in choice.tools]
            allowed = AllowedToolList(mode=choice.mode, tools=tools)
            return AllowedTools(type="allowed_tools", allowed_tools=allowed)
    return choice
