"""The prompt of a conversation: its messages and tools, as the chat template reads them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokendance.errors import PromptError
from tokendance.models.encoder import PromptEncoder
from tokendance.models.thoughts import Standing
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.errors import bad_request
from tokendance.server.protocol import ChatMessage, ChatRequest, Tool
from tokendance.server.tool_format import NO_PARAMETERS, ToolFormat

_ROLES = {"developer": "system", "function": "tool"}


def encode_chat(
    body: ChatRequest, encoder: PromptEncoder, tools: ToolFormat, max_characters: int
) -> EncodedPrompt:
    """Encode a conversation.

    Some chat templates want user and assistant in turn, or know no system message. If the template
    refuses the messages, neighbours of one role are joined, and a system message becomes a user's.

    Raises:
        ApiError: for messages that the template refuses all the same, or that are too long.
    """
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message goes without add_generation_prompt. Leave one out."
        raise bad_request(message, "continue_final_message")
    messages = [_as_message(message, tools, encoder) for message in body.messages]
    template_tools = [_as_tool(tool) for tool in body.tools or () if body.may_call]
    if template_tools and not tools.in_template:
        text = tools.describe([tool["function"] for tool in template_tools])
        if messages[0]["role"] == "system":
            messages[0]["content"].append(_text(f"\n\n{text}"))
        else:
            messages.insert(0, {"role": "system", "content": [_text(text)]})
        template_tools = []
    texts = [part["text"] for message in messages for part in message["content"]]
    texts += [
        message["reasoning_content"] for message in messages if "reasoning_content" in message
    ]
    check_length([*texts, *map(json.dumps, template_tools)], max_characters)

    def prompt(of: Sequence[dict[str, Any]]) -> Prompt:
        return Prompt(
            of,
            tools=template_tools,
            template_options=body.template_options,
            ending=body.prompt_ending,
        )

    try:
        return encoder.encode(prompt(messages))
    except PromptError as error:
        try:
            return encoder.encode(prompt(_in_turn(messages)))
        except PromptError:
            raise bad_request(str(error), "messages") from error


def check_length(
    texts: Iterable[str], max_characters: int, param: str = "messages", whose: str = ""
) -> None:
    """Refuse texts that cannot fit the model's context, before they are tokenized.

    Raises:
        ApiError: if they have more than `max_characters` together.
    """
    total = sum(map(len, texts))
    if total > max_characters:
        raise bad_request(
            f"The prompt{whose} has {total} characters, more than the model's context can hold.",
            param,
            "context_length_exceeded",
        )


def standing_of(body: ChatRequest, prompt: EncodedPrompt, encoder: PromptEncoder) -> Standing:
    """Where the answer to a conversation begins: before thoughts, inside of them, or behind."""
    marks = encoder.thought_marks
    if marks is None or body.prompt_ending != "continue":
        return encoder.standing_behind(prompt.token_ids)
    return marks.standing_behind("".join(texts_of(body.messages[-1])))


def as_message(
    role: str, content: Any, name: str | None, thought: str | None = None
) -> dict[str, Any]:
    """A message for `Prompt`, with a role that templates know."""
    message = {"role": _ROLES.get(role, role), "content": content}
    if name:
        message["name"] = name
    if thought and role == "assistant":
        message["reasoning_content"] = thought
    return message


def _as_message(message: ChatMessage, tools: ToolFormat, encoder: PromptEncoder) -> dict[str, Any]:
    texts, thought = texts_of(message), message.thought
    if message.role == "assistant":
        marks = encoder.thought_marks
        if marks is not None and encoder.drops_thoughts and any(marks.end in one for one in texts):
            # A template that drops thoughts looks for their marks, and it does not see the text.
            said = marks.split("".join(texts))
            texts, thought = [said.text], thought or said.thought
        calls = [
            tools.write(call.function.name, _parsed(call.function.arguments))
            for call in message.tool_calls or ()
        ]
        break_ = "\n" if any(texts) and calls else ""
        texts.append(break_ + "\n".join(calls))
    content = [_text(text) for text in texts if text]
    return as_message(message.role, content, message.name, thought)


def _as_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True)
    return {"type": "function", "function": {**function, **NO_PARAMETERS, **function}}


def texts_of(message: ChatMessage) -> list[str]:
    """The texts of a message's content."""
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
