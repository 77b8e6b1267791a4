"""How tools are listed in a prompt, and how calls are written; `call_parser` reads them.

The chat template of a model that was trained to call tools lists them, and writes calls as the
model does. So the format is found by letting the template write a call. If the template lists no
tools, or its calls are not JSON, the system message lists the tools and explains a default format.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokendance.errors import PromptError
from tokendance.models.encoder import PromptEncoder

# For functions that are given without parameters; some templates look inside.
NO_PARAMETERS = {"parameters": {"type": "object", "properties": {}, "required": []}}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes a call: as {"name": ..., `arguments`: {...}} between two marks.

    Attributes:
        begin: the mark before a call; if it is empty, a call is a whole answer.
        end: the mark behind it.
        arguments: the key of the arguments.
        in_template: whether the chat template lists the tools, so that the system message need not.
    """

    begin: str = "<tool_call>\n"
    end: str = "\n</tool_call>"
    arguments: str = "arguments"
    in_template: bool = False

    def describe(self, functions: Sequence[Mapping[str, Any]]) -> str:
        """A list of functions for the system message, with the format of a call."""
        lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        example = self.write("its name", {"its": "arguments"})
        return f"You may call these functions:\n{lines}\nTo call one, answer\n{example}"

    def write(self, name: str, arguments: Any) -> str:
        """A call as the model writes it."""
        call = json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)
        return f"{self.begin}{call}{self.end}"

    def head(self, name: str) -> str:
        """What a call begins with, behind its mark; its arguments and a brace follow."""
        return f'{{"name": {json.dumps(name)}, {json.dumps(self.arguments)}: '


def find_tool_format(encoder: PromptEncoder) -> ToolFormat:
    """The format of a model's calls, as its chat template has it; else the default format."""
    name, word = (f"x{secrets.token_hex(8)}" for _ in range(2))
    tools = [{"type": "function", "function": {"name": name, "description": "", **NO_PARAMETERS}}]
    call = {"type": "function", "id": "a23456789", "function": {"name": name, "arguments": {}}}
    question = [{"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        if name not in encoder.render(question, tools):
            return ToolFormat()
        with_word = encoder.render([*question, {"role": "assistant", "content": word}], tools)
        with_call = encoder.render([*question, answer], tools)
    except PromptError:
        return ToolFormat()
    before, _, after = with_word.partition(word)
    tool_format = _read_format(with_call, before, after, name)
    is_special = encoder.spells_special(tool_format.begin + tool_format.end)
    return ToolFormat() if is_special else tool_format


def _read_format(conversation: str, before: str, after: str, name: str) -> ToolFormat:
    """The format of the call that a rendered conversation has between two texts."""
    if not conversation.startswith(before) or not conversation.endswith(after):
        return ToolFormat()
    text = conversation[len(before) : len(conversation) - len(after)]
    begin, brace, rest = text.partition("{")
    try:
        content, length = json.JSONDecoder().raw_decode(brace + rest)
    except ValueError:
        return ToolFormat()
    others = set(content) - {"name"}
    if content.get("name") != name or len(others) != 1:
        return ToolFormat()
    # Whitespace before a call is not part of its mark.
    return ToolFormat(begin.lstrip(), rest[length - 1 :], others.pop(), in_template=True)
