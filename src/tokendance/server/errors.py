"""Errors as OpenAI's clients know them: a status, and {"error": {message, type, param, code}}."""

import re
from collections.abc import Sequence
from typing import Any

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

_SHAPES = {"str", "int", "float", "bool", "list", "dict"}


class ApiError(Exception):
    """An answer that is not 200.

    Attributes:
        status: of HTTP.
        message: what happened, and what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's content."""
        fields = {"message": self.message, "type": _type_of(self.status)}
        return {"error": {**fields, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return bad_request(str(error), "messages")
    if isinstance(error, BudgetError):
        return bad_request(str(error), "max_tokens", "context_length_exceeded")
    if isinstance(error, ConstraintError):
        return bad_request(str(error), "response_format")
    if isinstance(error, ConfigError):
        return bad_request(str(error))
    if isinstance(error, AbortedError):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, StoreError):
        return ApiError(507, str(error), code="store_failed")
    if isinstance(error, TokenDanceError):
        return ApiError(500, str(error), code="request_failed")
    if isinstance(error, RequestValidationError):
        return _as_bad_request(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    # It is in the log with its traceback; the client learns no more than this.
    return ApiError(500, "The server failed on this request.")


def _as_bad_request(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    param = _field_name(first["loc"]) if first["type"] != "json_invalid" else None
    return bad_request(f"{param or 'The body'}: {first['msg']}.", param)


def _field_name(location: Sequence[str | int]) -> str | None:
    """The name of a field, from pydantic's location of an error.

    Where a field may have one of several shapes, the location names the shape, too.
    """
    names = [str(name) for name in location if name != "body" and name not in _SHAPES]
    return ".".join(name for name in names if re.fullmatch("[a-z_]+|[0-9]+", name)) or None


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
