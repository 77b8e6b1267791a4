"""Adds to /openapi.json what FastAPI cannot read from the routes: streams, errors and keys."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse

_ERRORS = {
    400: "The request cannot be answered as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, or no such answer.",
    408: "The body took too long to arrive.",
    409: "A round of the session is under way.",
    413: "The body is too large, or the conversation has too many messages.",
    429: "Too many requests are being answered.",
    503: "The server stops, or its engine has failed.",
    507: "The store cannot be read.",
}
_ERRORS_OF_BODIES = {400, 404, 408, 413, 429, 503}
_TEXT, _TEXT_OR_NONE = {"type": "string"}, {"type": ["string", "null"]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NONE, "code": _TEXT_OR_NONE}
_RETRY_AFTER = {
    "Retry-After": {
        "required": True,
        "schema": {"type": "integer"},
        "description": "Seconds after which to ask again.",
    }
}


def whole_or_stream(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """An answer in one document, or as a stream of events: for a route's `responses`."""
    return {200: {"model": answer, "content": {"text/event-stream": {}}}}


class DocumentedAPI(FastAPI):
    """An application that documents its errors, and which paths need a key."""

    def setup(self) -> None:
        """Add the document's path: it takes 0.1 s to make, on a thread, not on the event loop."""

        def document(_: Request) -> JSONResponse:
            return JSONResponse(self.openapi())

        if self.openapi_url is not None:
            self.add_route(self.openapi_url, document, include_in_schema=False)
        super().setup()  # whose own route for it comes behind

    def openapi(self) -> dict[str, Any]:
        """The document."""
        document = super().openapi()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas["Error"] = _object({"error": _object(_FIELDS)})
        # Bodies that are not valid get our own errors, not those that FastAPI documents.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        open_paths = self.state.context.keys.open_paths
        if open_paths is not None:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                statuses = set(_ERRORS_OF_BODIES if "requestBody" in operation else ())
                statuses |= {404} if "{" in path else set()
                statuses |= {409, 507} if path == "/v1/rounds" else set()
                if open_paths is not None and path not in open_paths:
                    operation["security"] = [{"key": []}]
                    statuses.add(401)
                errors = {str(status): _error(status) for status in sorted(statuses)}
                operation["responses"].update(errors)
        return document


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields), "properties": fields}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    described = {"description": _ERRORS[status], "content": content}
    return described | {"headers": _RETRY_AFTER} if status in (429, 503) else described
