"""Bodies of requests, in OpenAI's format.

Fields that mean nothing to a local model are accepted and ignored. Fields that would change the
answer and are not supported are refused by name (`unsupported.py`), and so are unknown ones.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tokendance.rounds.prompts import Ending
from tokendance.server.messages import TEXT_PARTS, Lenient, Message, TextPart
from tokendance.server.unsupported import leave_out_neutral, read_guided

# Pydantic lists all errors of a body, though the client is told the first only. So that there are
# never a million, lists fail at their first error, and objects have no more fields than this.
_MAX_FIELDS = 256


def _check_size(value: Any, limit: int) -> Any:
    if isinstance(value, dict) and len(value) > limit:
        message = f"It has {len(value)} fields, and at most {limit} are taken"
        raise PydanticCustomError("too_many_fields", message)
    return value


def _at_most(limit: int) -> BeforeValidator:
    return BeforeValidator(lambda value: _check_size(value, limit))


Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenList = Annotated[list[int], Field(fail_fast=True)]
Private = Literal["isolated"]  # see `Prompt`, likewise the next
Reuse = Literal["exact"]
# Names that templates are given by others.
_TEMPLATE_NAMES = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents",
    "messages", "tokenize", "tools",
}  # fmt: skip


def _check_options(options: Any) -> Any:
    if isinstance(options, dict):
        for name, value in options.items():
            if not str(name).isidentifier() or name in _TEMPLATE_NAMES or len(name) > 64:
                message = f"It may not have {str(name)[:40]!r}"
                raise PydanticCustomError("template_option", "{text}", {"text": message})
            if not isinstance(value, bool | int | float | str) or len(str(value)) > 1024:
                message = f"{name[:40]!r} is no number, short text, true or false"
                raise PydanticCustomError("template_option", "{text}", {"text": message})
    return options


TemplateOptions = Annotated[
    dict[str, Any], Field(max_length=16), BeforeValidator(_check_options), _at_most(16)
]
Biases = Annotated[dict[str, float], Field(max_length=1024), _at_most(1024)]
Blocks = Annotated[dict[str, str], Field(max_length=4096), _at_most(4096)]


class Body(Lenient):
    """A body, or an object in one, that refuses fields which it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        return _check_size(body, _MAX_FIELDS)


class FunctionCall(Lenient):
    """What a model wants to call."""

    name: Annotated[str, Field(max_length=64)]
    arguments: str = "{}"


class ToolCall(Lenient):
    """A call in an earlier answer."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Message):
    """One message of a conversation, in a chat request."""

    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True, max_length=4096)] | None,
        TEXT_PARTS,
    ] = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=1024)] | None = None
    tool_call_id: str | None = None


class FunctionSpec(Lenient):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Lenient):
    """Which function has to be called."""

    name: str


class NamedTool(Lenient):
    """Which tool has to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedToolList(Lenient):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=128)]


class AllowedTools(Lenient):
    """Which tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


def _kind_of_choice(choice: Any) -> str:
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", "word")
    return f"a {kind}" if kind in ("word", "allowed_tools") else "a function"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("a function")]
    | Annotated[AllowedTools, Tag("a allowed_tools")],
    Discriminator(_kind_of_choice),
]


class JsonSchema(Lenient):
    """A schema for an answer."""

    name: str = ""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Lenient):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Lenient):
    """What a stream holds."""

    include_usage: bool | None = None


class RoundField(Body):
    """The round that a request belongs to.

    Attributes:
        id: any text; requests with the same one run together.
        size: requests of the round: it starts when they are there, or after a short wait.
        agent: whose request this is.
        session: its KV is kept on disk after each round, where the server has a store.
    """

    id: Name
    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    agent: Name | None = None
    session: Name | None = None


class Sampling(Body):
    """What requests of all kinds say of how tokens are chosen."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Biases | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenList, Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    round: RoundField | None = None
    private: Private | None = None
    reuse: Reuse | None = None
    # Accepted and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    priority: int | None = None
    request_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, body: Any) -> Any:
        return leave_out_neutral(body, known=cls.model_fields.keys())

    @property
    def max_tokens_asked(self) -> int | None:
        """Most tokens of the answer, if the client has said it."""
        return self.max_tokens


class StructuredOutputs(Body):
    """What an answer has to look like, as vLLM's clients say it: one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1)] | None = None
    json_object: bool | None = None


class PromptRequest(Sampling):
    """What requests with a prompt say besides."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_guided(cls, body: Any) -> Any:
        return read_guided(body)


class ChatRequest(PromptRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    share_reasoning: bool | None = None
    # Accepted and ignored.
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @property
    def max_tokens_asked(self) -> int | None:
        """Most tokens of the answer, if the client has said it."""
        asked = self.max_completion_tokens
        return self.max_tokens if asked is None else asked

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template is told, if it asks for it."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return thinking | (self.chat_template_kwargs or {})

    @property
    def prompt_ending(self) -> Ending:
        """See `Prompt`."""
        if self.continue_final_message:
            return "continue"
        return "message" if self.add_generation_prompt is False else "answer"

    @property
    def may_call(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(PromptRequest):
    """Body of /v1/completions."""

    prompt: (
        str
        | TokenList
        | Annotated[list[str], Field(fail_fast=True, max_length=1024)]
        | Annotated[list[TokenList], Field(fail_fast=True, max_length=1024)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None


class BlockRef(Body):
    """A shared block of a round, by its id."""

    type: Literal["block"] = "block"
    id: str


class SharedText(Body):
    """Text that others of the round may have, too."""

    type: Literal["shared"]
    text: str


# In this order, as a body may have thousands of references: each is then tried once.
RoundPart = Annotated[BlockRef | SharedText | TextPart, Field(union_mode="left_to_right")]


class RoundMessage(Message):
    """A message of an agent; its parts may be blocks of the round."""

    content: str | Annotated[list[RoundPart], Field(fail_fast=True, max_length=4096)] | None = None


class RoundAgent(Sampling):
    """One agent of a round, with messages or with segments.

    Attributes:
        agent: its name.
        model: may be left out.
        system: who it is, in a session in which it is new.
        task: what it is asked, in a session.
    """

    agent: Name
    model: str = ""
    system: str | None = None
    task: str | None = None
    messages: (
        Annotated[list[RoundMessage], Field(fail_fast=True, min_length=1, max_length=4096)] | None
    ) = None
    segments: (
        Annotated[list[RoundPart], Field(fail_fast=True, min_length=1, max_length=4096)] | None
    ) = None


class RoundRequest(Body):
    """Body of /v1/rounds: all agents of a round, and the blocks that they share.

    Attributes:
        model: its name.
        agents: of the round.
        blocks: shared texts by their ids, outside sessions.
        stream: whether answers come one by one.
        session: whose next round it is; see `server/sessions.py`.
        private: of all its agents; an agent may also have it alone.
        cache_salt: nothing is shared with what has another, or none.
        ttl_s: seconds for which a session is sure to be kept after its last round.
        share_reasoning: whether what is thought stays in the answers' text, and others hear it.
    """

    model: str
    agents: Annotated[list[RoundAgent], Field(fail_fast=True, min_length=1, max_length=512)]
    blocks: Annotated[Blocks, Field(default_factory=dict)]
    stream: bool | None = None
    session: Name | None = None
    private: Private | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    ttl_s: Annotated[float, Field(gt=0)] | None = None
    share_reasoning: bool | None = None
