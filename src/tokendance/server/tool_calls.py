"""Calls of tools: how a model is told of them, how it writes them, and how they are read.

A model that was trained to call tools has a chat template that lists them, and that writes a call
as the model would: it is found out by letting the template write one. Where the template lists no
tools, or calls are no JSON objects, the system message lists them and says how they are called.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokendance.errors import PromptError
from tokendance.models.encoder import PromptEncoder

# What a function has that says nothing of its arguments; some templates look inside.
NO_PARAMETERS = {"parameters": {"type": "object", "properties": {}, "required": []}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an answer makes: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes a call: as {"name": ..., `arguments`: {...}} between two texts.

    Attributes:
        begin: what stands before it; if that is empty, a call is the whole of an answer.
        end: what stands behind it.
        arguments: the key of its arguments.
        in_template: whether the chat template lists the tools, so that nobody else has to.
    """

    begin: str = "<tool_call>\n"
    end: str = "\n</tool_call>"
    arguments: str = "arguments"
    in_template: bool = False

    def describe(self, functions: Sequence[Mapping[str, Any]]) -> str:
        """What a model is told whose template lists no tools."""
        listed = "\n".join(json.dumps(one, ensure_ascii=False) for one in functions)
        example = self.write("its name", {"its": "arguments"})
        return f"You may call these functions:\n{listed}\nTo call one, answer\n{example}"

    def write(self, name: str, arguments: Any) -> str:
        """A call as the model would write it."""
        call = json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)
        return f"{self.begin}{call}{self.end}"

    def split(self, text: str) -> tuple[str, list[ToolCall]]:
        """Cut an answer into its words and the calls that it makes.

        What looks like a call and does not parse, as when the answer was cut off, stays text.
        """
        words: list[str] = []
        calls: list[ToolCall] = []
        rest = text
        while rest:
            before, found, after = self._cut(rest)
            call, later = self._read(after) if found else (None, "")
            if call is None:
                words.append(rest)
                break
            words.append(before)
            calls.append(call)
            rest = later
        return "".join(words).strip() if calls else text, calls

    def _cut(self, text: str) -> tuple[str, bool, str]:
        """What stands before a call, whether one may be there, and what follows its beginning."""
        mark = self.begin.strip()
        if not mark:
            return "", text.lstrip().startswith("{"), text
        before, found, after = text.partition(mark)
        return before, bool(found), after

    def _read(self, text: str) -> tuple[ToolCall | None, str]:
        """Read the call that a text begins with, up to its end; return it and what follows."""
        body = text.lstrip()
        try:
            call, end = json.JSONDecoder().raw_decode(body)
            found = ToolCall(str(call["name"]), json.dumps(call[self.arguments]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None, text
        rest, mark = body[end:].lstrip(), self.end.strip()
        if not rest.startswith(mark):
            return None, text
        return found, rest.removeprefix(mark)


def find_tool_format(encoder: PromptEncoder) -> ToolFormat:
    """How a model calls tools, by its chat template; the format of this server if that has none."""
    name, word = (f"x{secrets.token_hex(8)}" for _ in range(2))
    tools = [{"type": "function", "function": {"name": name, "description": "", **NO_PARAMETERS}}]
    call = {"type": "function", "id": "a23456789", "function": {"name": name, "arguments": {}}}
    asked = [{"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        if name not in encoder.render(asked, tools):
            return ToolFormat()
        said = encoder.render([*asked, {"role": "assistant", "content": word}], tools)
        called = encoder.render([*asked, answer], tools)
    except PromptError:
        return ToolFormat()
    found = _read_format(said.partition(word), called, name)
    if found is None or encoder.spells_special(found.begin + found.end):
        return ToolFormat()
    return found


def _read_format(said: tuple[str, str, str], called: str, name: str) -> ToolFormat | None:
    """Read a format from a conversation with a call, and the same around a word in its place."""
    before, _, after = said
    if not called.startswith(before) or not called.endswith(after):
        return None
    text = called[len(before) : len(called) - len(after)]
    first = text.find("{")
    if first < 0:
        return None
    try:
        content, length = json.JSONDecoder().raw_decode(text[first:])
    except ValueError:
        return None
    others = set(content) - {"name"}
    if content.get("name") != name or len(others) != 1:
        return None
    # Blanks before a call are not what tells it from words.
    return ToolFormat(text[:first].lstrip(), text[first + length :], others.pop(), in_template=True)
