"""What a caller writes: parts of text or token ids, chat messages, and `<TTSEP>`.

The separator is an application's way to say where the blocks of a prompt begin (TokenDance,
section "Round-Aware Prompt Interface"). It is read only in text that the application hands
over as a whole: a string prompt, or the string content of a chat message. Inside a part that
was marked by `shared()` or `private()` it has no meaning, and it is taken out of the text, so
that words of an agent or a user that contain it neither move a boundary nor reach the model.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tokendance.errors import PromptError

SEPARATOR = "<TTSEP>"
_SEPARATOR = list(SEPARATOR)

Message = Mapping[str, Any]
Ending = Literal["answer", "message", "continue"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a prompt before it is tokenized; token ids are taken as they are."""

    content: str | tuple[int, ...]
    shared: bool  # whether other prompts may have the same part

    def __post_init__(self) -> None:
        if isinstance(self.content, str):
            object.__setattr__(self, "content", strip_separator(self.content))
        elif not isinstance(self.content, tuple):
            raise PromptError(
                f"A part is a {type(self.content).__name__}. Give it text, or a tuple of token ids."
            )


def shared(content: str | Sequence[int]) -> Part:
    """Mark a part that several agents read: its KV is computed once."""
    return _part(content, shared=True)


def private(content: str | Sequence[int]) -> Part:
    """Mark a part that belongs to one agent."""
    return _part(content, shared=False)


def _part(content: str | Sequence[int], *, shared: bool) -> Part:
    if isinstance(content, str):
        return Part(content, shared)
    try:
        return Part(tuple(operator.index(token) for token in content), shared)
    except TypeError as error:
        raise PromptError(
            f"A part is a {type(content).__name__}. Give it text, or a list of token ids."
        ) from error


def strip_separator(text: str) -> str:
    """Take every separator out of `text`, also those that appear when others are gone.

    For applications that paste words of others into a text with separators of their own.
    """
    if SEPARATOR not in text:
        return text
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character == SEPARATOR[-1] and kept[-len(SEPARATOR) :] == _SEPARATOR:
            del kept[-len(SEPARATOR) :]
    return "".join(kept)


def split_text(text: str, *, shared_without_separator: bool = False) -> list[Part]:
    """Split a text at its separators.

    With a separator, each part may be shared: which ones are is seen from the other prompts.
    Without one, the text is a single part, private unless `shared_without_separator` is set.
    """
    if SEPARATOR not in text:
        return [Part(text, shared_without_separator)]
    return [Part(content, True) for content in text.split(SEPARATOR) if content]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One agent's prompt in a round.

    Attributes:
        content: text (split at `<TTSEP>`), token ids, parts made by `shared()` and `private()`,
            or chat messages, whose content is a string, a list of parts, or a list of
            `{"type": "text", "text": ...}`.
        agent: the agent's name; a round wants each name once. Numbered if left out.
        tools: functions that an answer to chat messages may call, as OpenAI describes them, for
            models whose chat template lists them.
        template_options: names and values that the chat template may ask for, such as
            {"enable_thinking": False}; those that it does not ask for change nothing.
        reuse: "exact" computes this prompt whole and in passes of its own, so that the answer is
            the same to the bit whatever else runs; None does as the engine does.
        dropped_tokens: that were left out so that it fits, for the figures; a session counts them.
        private: "isolated" lets nothing that others read be computed behind text of this prompt
            that they do not have; None does as the engine does.
        ending: of chat messages: "answer" where the template lets an answer begin, "message"
            where it lets the last message end, "continue" where the text of that message ends,
            an assistant's, which the answer goes on with.
    """

    content: str | Sequence[int] | Sequence[Part] | Sequence[Message]
    agent: str | None = None
    reuse: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    dropped_tokens: int = 0
    private: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    ending: Ending = "answer"

    def __post_init__(self) -> None:
        if not isinstance(self.agent, str | None):
            raise PromptError(f"A prompt's agent is a {type(self.agent).__name__}. Give a name.")
        if not isinstance(self.tools, list | tuple) or not all(
            isinstance(tool, Mapping) for tool in self.tools
        ):
            raise PromptError("A prompt's tools are no list of mappings. Give them as OpenAI does.")
        if self.reuse not in (None, "exact"):
            raise PromptError(
                f"A prompt's reuse is {self.reuse!r}. Use None for the engine's way, or 'exact'."
            )
        if self.private not in (None, "isolated"):
            raise PromptError(
                f"A prompt's private is {self.private!r}. "
                "Use None for the engine's way, or 'isolated'."
            )
        if self.ending not in get_args(Ending):
            raise PromptError(
                f"A prompt's ending is {self.ending!r}. Use 'answer', 'message' or 'continue'."
            )


PromptLike = str | Sequence[int] | Sequence[Part] | Sequence[Message] | Prompt


def as_prompt(value: PromptLike) -> Prompt:
    """Wrap a bare content into a Prompt."""
    return value if isinstance(value, Prompt) else Prompt(value)


def message_parts(message: Message) -> list[Part]:
    """Cut the content of a chat message into parts.

    A system message is private; any other may be shared as a whole, which the other prompts of
    the round decide. A `name` is put before the content, since most chat templates drop it.

    Raises:
        PromptError: for a content that is neither text nor a list of texts and parts.
    """
    content = message.get("content")
    may_share = message.get("role") != "system"
    name = strip_separator(str(message.get("name") or ""))
    prefix = f"{name}: " if name else ""
    if isinstance(content, str):
        return split_text(prefix + content, shared_without_separator=may_share)
    parts = [Part(prefix, False)] if prefix else []
    if content is None:
        return parts
    if not isinstance(content, Sequence):
        raise PromptError(
            f"A message's content is a {type(content).__name__}. Give it text or a list of parts."
        )
    for item in content:
        if isinstance(item, Part):
            parts.append(item)
        elif isinstance(item, Mapping) and item.get("type") == "text":
            parts.extend(split_text(str(item.get("text", "")), shared_without_separator=may_share))
        else:
            raise PromptError(
                f"A message holds {type(item).__name__!r}, which is not text. "
                "Use a string, shared()/private() parts, or {'type': 'text', 'text': ...}."
            )
    return parts
