"""Errors in OpenAI's format: a status, and {"error": {message, type, param, code}}."""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tokendance.errors import (
    AbortedError,
    BudgetError,
    ConfigError,
    ConstraintError,
    InputError,
    StoreError,
    TokenDanceError,
)

Raised = TypeVar("Raised", bound=BaseException)

_NO_OBJECT = (
    "The body was not read as a JSON object. Send one, with the header Content-Type: "
    "application/json."
)
# Names that pydantic puts into the place of an error, and that are no fields.
_TYPES = {"str", "int", "float", "bool", "list", "dict"}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is not 200.

    Attributes:
        status: of HTTP.
        message: what happened, and what to do.
        param: the field of the request that is wrong.
        code: an identifier for programs.
        headers: of the answer.
    """

    status: int
    message: str
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The answer's content."""
        fields = {"message": self.message, "type": _type_of(self.status)}
        return {"error": {**fields, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of status 400."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """Turn any exception into the error that the client gets."""
    text = str(error)
    match error:
        case ApiError():
            return error
        case InputError():
            return bad_request(text, "messages")
        case BudgetError():
            return bad_request(text, "max_tokens", "context_length_exceeded")
        case ConstraintError():
            return bad_request(text, "response_format")
        case ConfigError():
            return bad_request(text)
        case AbortedError():
            return ApiError(503, text, headers={"Retry-After": "5"})
        case StoreError():
            return ApiError(507, text, code="store_failed")
        case TokenDanceError():
            return ApiError(500, text, code="request_failed")
        case RequestValidationError():
            first = error.errors()[0]
            param = _field_name(first["loc"]) if first["type"] != "json_invalid" else None
            if first["type"] == "unsupported":
                return bad_request(first["msg"], first["ctx"]["field"])
            if first["type"] == "extra_forbidden":
                return bad_request(f"{param or 'A field'} is not supported. Leave it out.", param)
            if tuple(first["loc"]) == ("body",) and first["type"] != "missing":
                return bad_request(_NO_OBJECT)
            return bad_request(f"{param or 'The body'}: {first['msg']}.", param)
        case HTTPException() if isinstance(error.__cause__, RecursionError):
            return bad_request("The body is nested too deeply to be read. Nest it less.")
        case HTTPException() if isinstance(error.__cause__, UnicodeDecodeError):
            return bad_request("The body is not UTF-8. Send JSON in UTF-8.")
        case HTTPException():
            headers = dict(error.headers or {})
            return ApiError(error.status_code, str(error.detail), headers=headers)
    # The log has its traceback; the client gets no details.
    return ApiError(500, "The server failed on this request.")


def _field_name(location: Sequence[str | int]) -> str | None:
    """The name of a field, from pydantic's location of an error.

    If a field has a type among several, the location has the name of the type, too.
    """
    names = [str(name) for name in location if name != "body" and name not in _TYPES]
    return ".".join(name for name in names if re.fullmatch("[a-z_]+|[0-9]+", name)) or None


def _type_of(status: int) -> str:
    types = {401: "authentication_error", 429: "rate_limit_error"}
    return types.get(status, "invalid_request_error" if status < 500 else "server_error")


def without_origin(error: Raised) -> Raised:
    """An error that is kept, or was by whoever raised it, without what led to it.

    Its traceback, and those of the errors behind it, lead to frames. One that knows the error
    closes a circle of references, with all else that it knows, as the whole body of a request.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
