"""POST /v1/chat/completions."""

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from tokendance.errors import PromptError
from tokendance.executor.step import TokenLogprobs
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.prompts import SEPARATOR, Prompt
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, bad_request
from tokendance.server.grammar import GrammarConstraint, Grammars
from tokendance.server.jobs import Delta
from tokendance.server.protocol import ChatMessage, ChatRequest, NamedTool, Tool
from tokendance.server.respond import Answer, PromptEndpoint, finish_reason
from tokendance.server.responses import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    StreamedTool,
    Usage,
)
from tokendance.server.tool_calls import NO_PARAMETERS, ToolFormat

_ROLES = {"developer": "system", "function": "tool"}


class ChatEndpoint(PromptEndpoint[ChatRequest]):
    """A request for answers to a conversation."""

    kind = "chatcmpl"

    def __init__(self, context: ServerContext, tenant: str, body: ChatRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        # In a stream, by answer: text that may turn out to be a call and is not sent yet.
        self._held: dict[int, str] = {}

    def read(self) -> None:
        """Encode the messages."""
        context, body = self.context, self.body
        count, most = len(body.messages), context.settings.max_messages
        if count > most:
            message = f"There are {count} messages, and at most {most} are taken."
            raise ApiError(413, message, param="messages")
        # First, since tools that are refused here would take long to list in the prompt.
        constraint = constraint_of(body, context.grammars, context.tools, self.tenant)
        prompt = encode_chat(body, self.encoder, context.tools, context.max_characters)
        self.check_choices(1)
        # Separators in the messages mark their shared blocks.
        marked = any(SEPARATOR in text for message in body.messages for text in _texts(message))
        self.add_jobs(body, [prompt], constraint=constraint, marked=marked)

    def document(self, answers: Sequence[Answer], usage: Usage) -> ChatAnswer:
        """A choice for each answer."""
        choices = []
        for index, answer in enumerate(answers):
            output = answer.output
            text, calls = self._split(output.text)
            message = AnswerMessage(role="assistant", content=text)
            if calls:
                message.content = text or None
                message.tool_calls = [CalledTool(**_called(function)) for function in calls]
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(output.token_ids, answer.logprobs),
                    finish_reason="tool_calls" if calls else finish_reason(output),
                )
            )
        return ChatAnswer(**self.head, object="chat.completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[ChatChunk]:
        """The role first, then text and calls, and at last the finish reason."""
        index, text = delta.index, delta.text
        choices: list[ChatChunkChoice] = []

        def add(delta: ChatDelta, **fields: Any) -> None:
            fields = {"finish_reason": None, **fields}
            choices.append(ChatChunkChoice(index=index, delta=delta, **fields))

        if index not in self._held:
            self._held[index] = ""
            add(ChatDelta(role="assistant", content=""))
        if self.body.may_call:
            self._held[index] += text
            text = ""
        if delta.logprobs:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            add(ChatDelta(content=text), logprobs=logprobs)
        elif text:
            add(ChatDelta(content=text))
        if delta.output is not None:
            text, calls = self._split(self._held[index])
            if text:
                add(ChatDelta(content=text))
            if calls:
                called = [StreamedTool(index=i, **_called(call)) for i, call in enumerate(calls)]
                add(ChatDelta(tool_calls=called))
            add(ChatDelta(), finish_reason="tool_calls" if calls else finish_reason(delta.output))
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=choices, **fields)

    def _split(self, text: str) -> tuple[str, list[CalledFunction]]:
        """The text and the calls of an answer."""
        return self.context.tools.split(text) if self.body.may_call else (text, [])

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.context.token_text(token)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        return {
            "content": [
                entry(token, chosen.logprob)
                | {"top_logprobs": [entry(other, logprob) for other, logprob in chosen.top]}
                for token, chosen in zip(token_ids, logprobs, strict=False)
            ],
            "refusal": None,
        }


def _called(function: CalledFunction) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


# ---- the prompt ----------------------------------------------------------------------------------


def encode_chat(
    body: ChatRequest, encoder: PromptEncoder, tools: ToolFormat, max_characters: int
) -> EncodedPrompt:
    """Encode a conversation.

    Some chat templates want user and assistant in turn, or know no system message. If the template
    refuses the messages, neighbours of one role are joined, and a system message becomes a user's.

    Raises:
        ApiError: for messages that the template refuses all the same, or that are too long.
    """
    messages = [_as_message(message, tools) for message in body.messages]
    template_tools = [_as_tool(tool) for tool in body.tools or () if body.may_call]
    if template_tools and not tools.in_template:
        text = tools.describe([tool["function"] for tool in template_tools])
        if messages[0]["role"] == "system":
            messages[0]["content"].append(_text(f"\n\n{text}"))
        else:
            messages.insert(0, {"role": "system", "content": [_text(text)]})
        template_tools = []
    texts = [part["text"] for message in messages for part in message["content"]]
    check_length([*texts, *map(json.dumps, template_tools)], max_characters)
    try:
        return encoder.encode(Prompt(messages, tools=template_tools))
    except PromptError as error:
        try:
            return encoder.encode(Prompt(_in_turn(messages), tools=template_tools))
        except PromptError:
            raise bad_request(str(error), "messages") from error


def check_length(texts: Iterable[str], max_characters: int, param: str = "messages") -> None:
    """Refuse texts that cannot fit the model's context, before they are tokenized.

    Raises:
        ApiError: if they have more than `max_characters` together.
    """
    total = sum(map(len, texts))
    if total > max_characters:
        raise bad_request(
            f"The prompt has {total} characters, more than the model's context can hold.",
            param,
            "context_length_exceeded",
        )


def as_message(role: str, content: Any, name: str | None) -> dict[str, Any]:
    """A message for `Prompt`, with a role that templates know."""
    message = {"role": _ROLES.get(role, role), "content": content}
    return {**message, "name": name} if name else message


def _as_message(message: ChatMessage, tools: ToolFormat) -> dict[str, Any]:
    texts = _texts(message)
    if message.role == "assistant":
        calls = [
            tools.write(call.function.name, _parsed(call.function.arguments))
            for call in message.tool_calls or ()
        ]
        break_ = "\n" if any(texts) and calls else ""
        texts.append(break_ + "\n".join(calls))
    return as_message(message.role, [_text(text) for text in texts if text], message.name)


def _as_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True)
    return {"type": "function", "function": {**function, **NO_PARAMETERS, **function}}


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


def _in_turn(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same text as messages of user and assistant in turn, the user first."""
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


# ---- the constraint ------------------------------------------------------------------------------


def constraint_of(
    body: ChatRequest, grammars: Grammars, tool_format: ToolFormat, tenant: str
) -> GrammarConstraint | None:
    """The constraint on the answer that tools or the response format require, if there is one.

    Raises:
        ApiError: for a schema that is not supported, or a tool that is missing.
    """
    tools = [
        {"name": tool.function.name, "parameters": tool.function.parameters}
        for tool in body.tools or ()
    ]
    choice = body.tool_choice or ("auto" if tools else "none")
    if choice != "none":
        if not tools:
            raise bad_request("tool_choice asks for tools, and there are none.", "tool_choice")
        if isinstance(choice, NamedTool):
            name = choice.function.name
            tools = [tool for tool in tools if tool["name"] == name]
            if not tools:
                message = f"tool_choice names {name!r}, which is not among the tools."
                raise bad_request(message, "tool_choice")
        return grammars.tool_calls(
            tools,
            tool_format,
            required=choice != "auto",
            several=body.parallel_tool_calls is not False,
            tenant=tenant,
        )
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return grammars.json_schema({"type": "object"}, "response_format", tenant)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request("json_schema needs a schema.", "response_format.json_schema")
    schema = wanted.json_schema.schema_
    return grammars.json_schema(schema, "response_format.json_schema", tenant)
