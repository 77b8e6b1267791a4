"""From a chat request to what the engine runs."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokendance.errors import PromptError
from tokendance.models.encoder import PromptEncoder
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import SEPARATOR, Prompt
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.errors import ApiError, bad_request
from tokendance.server.grammar import GrammarConstraint, Grammars
from tokendance.server.protocol import ChatMessage, ChatRequest, NamedTool, Sampling, Tool
from tokendance.server.settings import ServerSettings
from tokendance.server.tool_calls import NO_PARAMETERS, ToolFormat

_ROLES = {"developer": "system", "function": "tool"}

# ---- the prompt ---------------------------------------------------------------------------------


def check_length(texts: Iterable[str], limit: int, param: str = "messages") -> None:
    """Refuse texts of a prompt that no context could hold, before they are tokenized.

    Raises:
        ApiError: if they have more than `limit` characters.
    """
    total = sum(map(len, texts))
    if total > limit:
        raise bad_request(
            f"The prompt has {total} characters, more than the model's context can hold.",
            param,
            "context_length_exceeded",
        )


def encode_chat(
    body: ChatRequest,
    encoder: PromptEncoder,
    tools: ToolFormat,
    settings: ServerSettings,
    limit: int,
) -> EncodedPrompt:
    """Encode a conversation.

    A template that refuses it as it is (some want user and assistant in turn, some know no system
    message) gets it with neighbours of one role joined and the system's words at the head of the
    first message.

    Raises:
        ApiError: for what no template could take.
    """
    if len(body.messages) > settings.max_messages:
        raise ApiError(
            413,
            f"There are {len(body.messages)} messages, and at most {settings.max_messages} are "
            "taken.",
            param="messages",
        )
    messages = [_as_message(message, tools) for message in body.messages]
    listed = [_as_tool(tool) for tool in body.tools or () if body.may_call]
    if listed and not tools.in_template:
        text = tools.describe([tool["function"] for tool in listed])
        if messages[0]["role"] == "system":
            messages[0]["content"].append(_text(f"\n\n{text}"))
        else:
            messages.insert(0, {"role": "system", "content": [_text(text)]})
        listed = []
    texts = [part["text"] for message in messages for part in message["content"]]
    check_length([*texts, *map(json.dumps, listed)], limit)
    try:
        return encoder.encode(Prompt(messages, tools=listed))
    except PromptError as error:
        try:
            return encoder.encode(Prompt(_tamed(messages), tools=listed))
        except PromptError:
            raise bad_request(str(error), "messages") from error


def is_marked(body: ChatRequest) -> bool:
    """Whether a conversation says by separators where its blocks begin."""
    return any(SEPARATOR in text for message in body.messages for text in _texts(message))


def _as_message(message: ChatMessage, tools: ToolFormat) -> dict[str, Any]:
    texts = _texts(message)
    if message.role == "assistant":
        calls = [
            tools.write(call.function.name, _parsed(call.function.arguments))
            for call in message.tool_calls or ()
        ]
        said = "\n" if any(texts) and calls else ""
        texts.append(said + "\n".join(calls))
    return as_message(message.role, [_text(text) for text in texts if text], message.name)


def _as_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True)
    return {"type": "function", "function": {**function, **NO_PARAMETERS, **function}}


def as_message(role: str, content: Any, name: str | None) -> dict[str, Any]:
    """A message as `Prompt` takes it: its role is one that templates know."""
    found = {"role": _ROLES.get(role, role), "content": content}
    return {**found, "name": name} if name else found


def _texts(message: ChatMessage) -> list[str]:
    if message.content is None:
        return []
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _tamed(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same words as user and assistant in turn, the user first."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        content = list(message["content"])
        if message.get("name") and content:
            content.insert(0, _text(f"{message['name']}: "))
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += [_text("\n\n"), *content]
        else:
            joined.append({"role": role, "content": content})
    if joined[0]["role"] == "assistant":
        joined.insert(0, {"role": "user", "content": []})
    return joined


# ---- how it is sampled --------------------------------------------------------------------------


def sampling_params(
    body: Sampling, settings: ServerSettings, vocab_size: int, choice: int = 0
) -> SamplingParams:
    """What the engine is told; OpenAI's defaults where the client says nothing.

    Args:
        body: the request.
        settings: of the server.
        vocab_size: of the model.
        choice: which of the `n` answers.
    """
    wanted = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not text for text in stop):
        raise bad_request("A stop text is empty.", "stop")
    top = None
    if isinstance(body, ChatRequest):
        top = (body.top_logprobs or 0) if body.logprobs else None
    else:
        top = getattr(body, "logprobs", None)
    return SamplingParams(
        max_tokens=wanted or settings.default_max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else (body.seed + choice) % 2**63,
        stop=stop,
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=top,
        logit_bias=_logit_bias(body, vocab_size),
    )


def _logit_bias(body: Sampling, vocab_size: int) -> tuple[tuple[int, float], ...]:
    found: list[tuple[int, float]] = []
    for key, bias in (body.logit_bias or {}).items():
        if not key.isdecimal() or len(key) > 9 or int(key) >= vocab_size:
            raise bad_request(f"logit_bias names {key[:20]!r}, no token id.", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request("A logit_bias lies between -100 and 100.", "logit_bias")
        found.append((int(key), bias))
    return tuple(found)


def constraint_of(
    body: ChatRequest, grammars: Grammars, tool_format: ToolFormat
) -> GrammarConstraint | None:
    """What the answer has to look like, if the client says so.

    Raises:
        ApiError: for a schema that cannot be followed, or a tool that is not there.
    """
    tools = [tool.function.model_dump() for tool in body.tools or ()]
    choice = body.tool_choice or ("auto" if tools else "none")
    if choice != "none":
        if not tools:
            raise bad_request("tool_choice asks for tools, and there are none.", "tool_choice")
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool["name"] == choice.function.name]
            if not tools:
                raise bad_request(
                    f"tool_choice names {choice.function.name!r}, which is not among the tools.",
                    "tool_choice",
                )
        return grammars.tool_calls(
            tools,
            tool_format,
            required=choice != "auto",
            several=body.parallel_tool_calls is not False,
        )
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return grammars.json_schema({"type": "object"}, "response_format")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request("json_schema needs a schema.", "response_format.json_schema")
    return grammars.json_schema(wanted.json_schema.schema_, "response_format.json_schema")
