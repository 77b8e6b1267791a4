"""Documents of answers, in OpenAI's format.

Only fields that were set are sent: those with a default may be missing from an answer.
"""

import json
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


def dump(document: BaseModel) -> dict[str, Any]:
    """A document as JSON has it."""
    return document.model_dump(exclude_unset=True)


class JSONAnswer(JSONResponse):
    """JSON in ASCII, as in streams: half a character of what a client has sent can be told, too."""

    def render(self, content: Any) -> bytes:
        """Write it."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _Document(BaseModel):
    id: str
    object: str
    created: int
    model: str


class CachedTokens(BaseModel):
    """Of the prompt's tokens, those that were not computed, and those with KV of another context.

    With a single owner for each run, the latter are some of the former, and the others are exact.
    """

    cached_tokens: int
    approximate_tokens: int


class AnswerTokens(BaseModel):
    """Of the answers' tokens, those that are thoughts, with their marks."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of a request; details of the answers where the model thinks."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: AnswerTokens | None = None


class CalledFunction(BaseModel):
    """Which function an answer calls, and its arguments as JSON."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A call that an answer makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What a model says; what it has thought before, if it thinks, by two names."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CalledTool] = []


# For each token of a prompt but the first, which has null: by token id, what is said of it.
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class ChatChoice(BaseModel):
    """One of the answers to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal[FinishReason, "tool_calls"]
    token_ids: list[int] | None = None


class ChatAnswer(_Document):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class MoreArguments(BaseModel):
    """More of a call's arguments."""

    arguments: str


class StreamedTool(BaseModel):
    """A call in a stream, by its number in the answer; its id and its name come first, alone."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction | MoreArguments


class ChatDelta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[StreamedTool] = []


class ChatChunkChoice(BaseModel):
    """What is new of one of the answers; a reason when it is done."""

    index: int
    delta: ChatDelta
    finish_reason: Literal[FinishReason, "tool_calls"] | None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Document):
    """Event of a stream of /v1/chat/completions; the last may have the usage, and no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class TextChoice(BaseModel):
    """One of the ways in which a text goes on."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextAnswer(_Document):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(BaseModel):
    """What is new of one of the texts; a reason when it is done."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextChunk(_Document):
    """Event of a stream of /v1/completions; the last may have the usage, and no choices."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class AgentAnswer(BaseModel):
    """What an agent of a round says; who ends last may have to warn that it is not stored.

    `dropped_tokens` is there in a session: tokens of what was said before that did not fit.
    """

    agent: str
    message: AnswerMessage
    finish_reason: FinishReason
    usage: Usage
    dropped_tokens: int = 0
    warning: str | None = None


class AgentError(BaseModel):
    """Why an agent of a round says nothing."""

    agent: str
    error: dict[str, Any]
    warning: str | None = None


class RoundAnswer(_Document):
    """Answer of /v1/rounds; `session` and `round` are there for a round of a session."""

    object: Literal["round"]
    session: str | None = None
    round: int | None = None
    agents: list[AgentAnswer | AgentError]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    """How the server is."""

    status: str


class Version(BaseModel):
    """Which version it is."""

    version: str
