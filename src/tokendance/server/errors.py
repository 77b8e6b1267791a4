"""Errors as OpenAI's clients know them: a status, and {"error": {message, type, param, code}}."""

from typing import Any

from tokendance.errors import (
    AbortedError,
    BudgetError,
    ConfigError,
    ConstraintError,
    InputError,
    StoreError,
    TokenDanceError,
)


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
        return {
            "error": {
                "message": self.message,
                "type": _type_of(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: TokenDanceError) -> ApiError:
    """What a client is told of an error of the engine."""
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
    return ApiError(500, str(error), code="request_failed")


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
