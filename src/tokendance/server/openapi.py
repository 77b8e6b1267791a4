"""What /openapi.json says beyond what FastAPI reads from the routes: answers, errors and keys."""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

_ERRORS = {
    400: "The request cannot be answered as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    409: "A round of the session is under way.",
    413: "The body is too large, or the conversation has too many messages.",
    429: "Too many requests are being answered.",
    503: "The server stops, or its engine has failed.",
    507: "The store cannot be read.",
}
_WITH_BODY = (400, 404, 408, 413, 429, 503)
_TEXT_OR_NONE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NONE,
                "code": _TEXT_OR_NONE,
            },
        }
    },
}
_RETRY_AFTER = {
    "Retry-After": {
        "required": True,
        "schema": {"type": "integer"},
        "description": "Seconds after which to ask again.",
    }
}


class CachedTokens(BaseModel):
    """Of the prompt's tokens, those that were not computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


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
    """What a model says."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CalledTool] = []


class ChatChoice(BaseModel):
    """One of the answers to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One of the ways in which a text goes on."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextAnswer(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class AgentAnswer(BaseModel):
    """What an agent of a round says; who ends last may have to warn that it is not stored."""

    agent: str
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    usage: Usage
    warning: str | None = None


class AgentError(BaseModel):
    """Why an agent of a round says nothing."""

    agent: str
    error: dict[str, Any]
    warning: str | None = None


class RoundAnswer(BaseModel):
    """Answer of /v1/rounds; `session` and `round` are there for a round of a session."""

    id: str
    object: Literal["round"]
    created: int
    model: str
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


def whole_or_stream(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """An answer in one document, or as a stream of events: for a route's `responses`."""
    return {200: {"model": answer, "content": {"text/event-stream": {}}}}


class DocumentedAPI(FastAPI):
    """An application whose document says which errors there are, and where keys are needed."""

    def openapi(self) -> dict[str, Any]:
        """The document."""
        document = super().openapi()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas["Error"] = _ERROR
        # What FastAPI says of bodies that do not fit is not what is answered here.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        open_paths = self.state.context.keys.open_paths
        if open_paths is not None:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                responses = operation["responses"]
                responses.pop("422", None)
                found = list(_WITH_BODY) if "requestBody" in operation else []
                found += [404] if "{" in path else []
                found += [409, 507] if path == "/v1/rounds" else []
                if open_paths is not None and path not in open_paths:
                    operation["security"] = [{"key": []}]
                    found.append(401)
                responses.update({str(status): _error(status) for status in sorted(found)})
        return document


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    described = {"description": _ERRORS[status], "content": content}
    return described | {"headers": _RETRY_AFTER} if status in (429, 503) else described
