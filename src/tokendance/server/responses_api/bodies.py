"""Body of /v1/responses, in OpenAI's format.

As in `protocol.py`, what means nothing here is taken, and what cannot be done is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tokendance.server.messages import Lenient, Speaker, only_parts
from tokendance.server.protocol import Name, PromptRequest, TemplateOptions
from tokendance.server.unsupported import Fields, leave_out_neutral

LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_NO_TOOLS = "This server runs no tools of its own. Give it as a function that you run."
_FIELDS: Fields = {
    "background": ((False,), "Wait for the answer, or stream it."),
    "conversation": ((), "Use previous_response_id."),
    "prompt": ((), "Send its text as instructions."),
    "context_management": (([],), "Leave it out."),
    "moderation": ((), "Leave it out."),
}


def _refuse(text: str) -> None:
    raise PydanticCustomError("unsupported_item", "{text}", {"text": text})


def _kind_of(value: Any, default: str = "") -> str:
    """The `type` of a part, an item or a tool, whether or not it has been read by now."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return default if kind is None else str(kind)[:40]


def _kind_of_item(item: Any) -> str:
    """The kind of an item; without one it is a message, or an id alone, which refers to an item."""
    is_id = isinstance(item, dict) and "id" in item and not {"role", "content"} & item.keys()
    return _kind_of(item, "item_reference" if is_id else "message")


def _check_item(item: Any) -> Any:
    """Refuse items that are not read, by their kind."""
    kind = _kind_of_item(item)
    if isinstance(item, dict) and kind not in _ITEMS:
        _refuse(f"It is an item of type {kind!r}, which is not supported. {_NO_TOOLS[:-1]}")
    return item


def _check_tool(tool: Any) -> Any:
    """Refuse tools that are no functions, by their kind."""
    if isinstance(tool, dict) and _kind_of(tool, "function") != "function":
        _refuse(f"{_kind_of(tool)!r} is not supported. {_NO_TOOLS[:-1]}")
    return tool


# The tags of alternatives hold blanks, so that the names of fields in errors are without them.
def _text_or_list(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a text"


class TextPart(Lenient):
    """A part of a message, or of what a tool answered."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str = ""
    refusal: str = ""


Parts = Annotated[list[TextPart], Field(fail_fast=True, max_length=4096)]
Content = Annotated[
    Annotated[str, Tag("a text")] | Annotated[Parts, Tag("a list")],
    Discriminator(_text_or_list),
    only_parts(*_TEXTS),
]


def _usable_id(value: Any) -> Any:
    return value if isinstance(value, str) and 0 < len(value) <= 256 else None


class _Item(Lenient):
    """An item. Unknown fields are ignored: clients send some."""

    id: Annotated[str | None, BeforeValidator(_usable_id)] = None


class InputMessage(_Item):
    """What somebody has said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content | None = None
    name: Speaker | None = None


class InputCall(_Item):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str = ""
    name: Annotated[str, Field(max_length=64)]
    arguments: str = "{}"


class InputCallOutput(_Item):
    """What a called function has answered."""

    type: Literal["function_call_output"]
    call_id: str = ""
    output: Content = ""


class InputReasoning(_Item):
    """What a model has thought before it answered."""

    type: Literal["reasoning"]
    content: Parts | None = None
    summary: Parts | None = None


class ItemReference(Lenient):
    """An item that is remembered, of an earlier input or answer."""

    type: Literal["item_reference"] = "item_reference"
    id: Name


# What is read of an input, once references are followed.
ReadItem = InputMessage | InputCall | InputCallOutput | InputReasoning
Item = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[InputCall, Tag("a function_call")]
    | Annotated[InputCallOutput, Tag("a function_call_output")]
    | Annotated[InputReasoning, Tag("a reasoning")]
    | Annotated[ItemReference, Tag("a item_reference")],
    Discriminator(lambda item: f"a {_kind_of_item(item)}"),
    BeforeValidator(_check_item),
]
Input = Annotated[
    Annotated[str, Tag("a text")] | Annotated[list[Item], Field(fail_fast=True), Tag("a list")],
    Discriminator(_text_or_list),
]


class FunctionTool(Lenient):
    """A function that a model may call."""

    type: Literal["function"] = "function"
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Lenient):
    """Which function has to be called."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Lenient):
    """Some of the functions, and whether one of them has to be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(fail_fast=True, min_length=1, max_length=128)]


def _check_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and _kind_of(choice) not in ("function", "allowed_tools"):
        _refuse(f"{_kind_of(choice)!r} is not supported. {_NO_TOOLS[:-1]}")
    return choice


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[ChosenFunction, Tag("a function")]
    | Annotated[AllowedFunctions, Tag("a allowed_tools")],
    Discriminator(lambda choice: f"a {_kind_of(choice, 'word')}"),
    BeforeValidator(_check_choice),
]


class TextFormat(Lenient):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Lenient):
    """How an answer is written."""

    format: TextFormat | None = None
    verbosity: str | None = None  # accepted and ignored


class Reasoning(Lenient):
    """How a model is to think."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: Annotated[str, Field(max_length=64)] | None = None


class ResponsesRequest(PromptRequest):
    """Body of /v1/responses."""

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(_check_tool)]],
            Field(fail_fast=True, max_length=128),
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(fail_fast=True, max_length=64)] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    share_reasoning: bool | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    # Accepted and ignored.
    reasoning: Reasoning | None = None
    max_tool_calls: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral_responses(cls, body: Any) -> Any:
        return leave_out_neutral(body, cls.model_fields, _FIELDS)

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's tokens are asked for."""
        asked = bool(self.logprobs) or bool(self.top_logprobs)
        return asked or LOGPROBS in (self.include or ())


def text_of(content: str | list[TextPart] | None) -> list[str]:
    """The texts of a content."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    return [part.refusal if part.type == "refusal" else part.text for part in content]
