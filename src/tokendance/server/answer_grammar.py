"""The grammar of an answer: text, calls of tools, and JSON of a schema, as a request wants them.

Each schema is a document of its own within it, so that its references are its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from tokendance.server.short_texts import Short, join, pattern_cost
from tokendance.server.shortest import Endings, shortest_of
from tokendance.server.tool_format import ToolFormat

# Whitespace in its usual places only: a small model may write whitespace for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

FORMAT_PARAM = "response_format.json_schema"
# Characters of a regular expression, or of all choices.
MAX_PATTERN = 20_000


class Calls(Enum):
    """Whether an answer calls tools: it may, or it is nothing but calls."""

    ALLOWED = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class NamedSchema:
    """A schema of a request.

    Attributes:
        name: of the tool, or of the format.
        schema: JSON Schema.
        strict: whether an answer has to fit it in all that it says.
        param: the field of the request that has it.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    param: str

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"The tool {self.name!r}" if self.param == "tools" else "The response format"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text that an answer has to be, whole, and no JSON.

    Attributes:
        rule: in the language of llguidance's grammars.
        param: the field of the request that has it.
        regex: what it has to match; None if it is one of some texts.
        longest: bytes of the longest of these.
    """

    rule: str
    param: str
    regex: str | None = None
    longest: int = 0

    @staticmethod
    def of_choice(choices: Sequence[str], param: str) -> "Pattern":
        """One of some texts."""
        longest = max(len(choice.encode(errors="surrogatepass")) for choice in choices)
        return Pattern(" | ".join(map(json.dumps, choices)), param, longest=longest)

    @staticmethod
    def of_regex(regex: str, param: str) -> "Pattern":
        """A text that a regular expression describes; one that is far too long is cut."""
        regex = regex[: MAX_PATTERN + 1]
        escaped = re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", regex, flags=re.DOTALL)
        return Pattern("/" + escaped.replace("\n", r"\n") + "/", param, regex)

    @property
    def cost(self) -> int:
        """Bytes that are enough to end it, wherever it stands; of one that a grammar has taken."""
        return self.longest if self.regex is None else pattern_cost(self.regex)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of its answer.

    Attributes:
        tools: that the answer may call.
        calls: whether it has to.
        several: whether it may call more than once.
        answer: what it looks like where it is no call; None for any text.
    """

    tools: tuple[NamedSchema, ...] = ()
    calls: Calls = Calls.ALLOWED
    several: bool = True
    answer: NamedSchema | Pattern | None = None


def json_schema_of(
    schema: Mapping[str, Any], *, coerce: bool = True, is_object: bool = False
) -> dict[str, Any]:
    """A schema as llguidance is given it.

    Args:
        schema: that it can hold.
        coerce: whether `oneOf` is held as `anyOf` where alternatives may be true at once.
        is_object: whether it describes an object though it does not say so.
    """
    guided = {"x-guidance": {**_JSON, "coerce_one_of": coerce}, **schema}
    says_kind = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"} & set(schema)
    return guided if says_kind or not is_object else {**guided, "type": "object"}


def coerce_one_of(schema: Any) -> bool:
    """Whether a schema has a `oneOf` whose alternatives may be true at once, for all one knows.

    They may not where a discriminator tells them apart, or their types do.
    """
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left.extend(one)
        elif isinstance(one, dict):
            left.extend(one.values())
            several = one.get("oneOf")
            if isinstance(several, list) and "discriminator" not in one:
                kinds = [each.get("type") if isinstance(each, dict) else None for each in several]
                if None in kinds or len(set(map(str, kinds))) < len(kinds):
                    return True
                if "integer" in kinds and "number" in kinds:
                    return True
    return False


def answer_grammar(
    wanted: Wanted,
    tools: Mapping[str, Mapping[str, Any]],
    answer: Mapping[str, Any] | Pattern | None,
    tool_format: ToolFormat,
) -> str:
    """The grammar of an answer, as llguidance reads it.

    Args:
        wanted: of the answer.
        tools: for each name, the schema of its arguments; see `json_schema_of`.
        answer: a schema of what is no call, or what describes it.
        tool_format: how calls are written.
    """
    begin, end = tool_format.begin, tool_format.end
    rules = []
    if answer is not None:
        rule = answer.rule if isinstance(answer, Pattern) else f"%json {json.dumps(answer)}"
        rules.append(f"answer: {rule}")
    for number, (name, schema) in enumerate(tools.items()):
        head = json.dumps(tool_format.head(name))
        rules.append(f'tool_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
    any_tool = " | ".join(f"tool_{number}" for number in range(len(tools)))
    if tools:
        rules.append(f"call: {_quoted(begin)} ({any_tool}) {_quoted(end)}")
    is_several = wanted.several and bool(begin)
    calls = 'call ("\\n" call)*' if is_several else "call"
    if not tools:
        start = "answer"
    elif wanted.calls is Calls.REQUIRED:
        start = calls
    elif answer is not None:
        start = f"{calls} | answer"
    elif begin:
        # Text goes on until a mark begins a call.
        mark = begin.strip()
        rest = begin[begin.index(mark) + len(mark) :]
        rules.append("TEXT: /(.|\\n)*/")
        rules.append(f"mark[lazy]: TEXT {json.dumps(mark)}")
        rules.append(f"told: mark {_quoted(rest)} ({any_tool}) {_quoted(end)}")
        start = "told* TEXT" if wanted.several else "told | TEXT"
    else:
        # A call without a mark is recognized by its first character.
        rules.append("words: /[ \\n]{0,4}[^{ \\n](.|\\n)*/")
        start = "call | words |"
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, ""])


def find_endings(
    tools: Mapping[str, Mapping[str, Any]],
    answer: Mapping[str, Any] | Pattern | None,
    tool_format: ToolFormat,
) -> Endings:
    """How an answer may be closed; the arguments are as `answer_grammar` has them."""
    endings = Endings()
    if isinstance(answer, Pattern):
        endings.has_patterns = True
        endings.choices.add(Short("", answer.cost, is_whole=False))
    elif answer is not None and shortest_of(answer, endings) is None:
        endings.is_endless = True
    for name, schema in tools.items():
        arguments = shortest_of(schema, endings)
        head = tool_format.head(name)
        if arguments is None:
            endings.is_endless = True
        else:
            call = join([tool_format.begin, head, arguments, "}", tool_format.end])
            endings.values |= {call, join([head, arguments, "}", tool_format.end])}
            endings.choices.add(join(["\n", call]))
    return endings


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""
