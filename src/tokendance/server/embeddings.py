"""POST /v1/embeddings."""

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Response
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tokendance.errors import InputError
from tokendance.models.embedders import Vectors
from tokendance.rounds.prompts import strip_separator
from tokendance.server.chat_prompt import check_length
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.protocol import Body, TokenList
from tokendance.server.unsupported import Fields, leave_out_neutral

_LEAVE_OUT = "Leave it out."
_FIELDS: Fields = {
    "normalize": ((True,), "All vectors have the length 1."),
    "embed_dtype": (("float32",), _LEAVE_OUT),
    "truncate": (("NONE", False), "Shorten the text yourself."),
}
_MANY = 65_536  # more are refused before they are looked at


def _read_input(given: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Say what may stand there, in place of why it is none of four things."""
    try:
        return read(given)
    except ValidationError as error:
        message = "Give a text or token ids, or a list of either"
        raise PydanticCustomError("no_input", message) from error


class EmbeddingRequest(Body):
    """Body of /v1/embeddings."""

    model: str
    input: Annotated[
        str
        | TokenList
        | Annotated[list[str], Field(fail_fast=True, max_length=_MANY)]
        | Annotated[list[TokenList], Field(fail_fast=True, max_length=_MANY)],
        WrapValidator(_read_input),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    # Accepted and ignored.
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, body: Any) -> Any:
        known = cls.model_fields
        return leave_out_neutral(leave_out_neutral(body, known), known, _FIELDS)


class Embedding(BaseModel):
    """A vector; in base64 its numbers are float32, the least significant byte first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """Answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embed(context: ServerContext, tenant: str, body: EmbeddingRequest) -> Response:
    """Make vectors of texts; raises ApiError."""
    context.check_embedding_model(body.model)
    size = context.embeddings.embedder.size
    if body.dimensions is not None and body.dimensions > size:
        raise bad_request(f"A vector has {size} dimensions, not more.", "dimensions")
    texts = _texts(body.input)
    most = context.settings.max_embedding_inputs
    if not texts or len(texts) > most:
        raise bad_request(f"There are {len(texts)} texts; 1 to {most} are taken.", "input")
    with context.admission.admitted(tenant):
        token_ids = await context.in_thread(tenant, lambda: _encoded(context, texts))
        vectors = await context.embeddings.embed(tenant, token_ids)
        num_tokens = sum(map(len, token_ids))
        context.metrics.note_embedded(num_tokens)
        content = await context.in_thread(
            tenant, lambda: "".join(_document(context, body, vectors, num_tokens))
        )
    return Response(content, media_type="application/json")


def _texts(given: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return given  # type: ignore[return-value]


def _encoded(context: ServerContext, texts: Sequence[str | list[int]]) -> list[list[int]]:
    """The token ids of texts; raises ApiError for those that are empty, too long or no tokens."""
    embedder = context.embeddings.embedder
    most = context.max_embedding_tokens
    found = []
    for index, text in enumerate(texts):
        param = f"input.{index}" if len(texts) > 1 else "input"
        if isinstance(text, str):
            check_length([text], 128 * most, param)
            content = strip_separator(text)
            try:
                token_ids = embedder.encode(content) if content else []
            except (InputError, TypeError, UnicodeError) as error:
                raise bad_request(str(error), param) from error
        else:
            token_ids = text
            if any(not 0 <= token < embedder.vocab_size for token in token_ids):
                message = f"A token id lies between 0 and {embedder.vocab_size - 1}."
                raise bad_request(message, param)
        if not token_ids:
            raise bad_request("A text is empty. Leave it out.", param)
        if len(token_ids) > most:
            raise bad_request(
                f"A text has {len(token_ids)} tokens, and at most {most} are taken "
                "(--max-embedding-tokens, and what the model can read). Send it in parts.",
                param,
                "context_length_exceeded",
            )
        found.append(token_ids)
    return found


def _document(
    context: ServerContext, body: EmbeddingRequest, vectors: Vectors, num_tokens: int
) -> Iterator[str]:
    """The answer as JSON, in pieces: written at once, a large one would keep all threads waiting.

    A vector that is cut to fewer dimensions has the length 1 again.
    """
    vectors = vectors[:, : body.dimensions]
    # At once, too: numpy gives the interpreter's lock away for moments, and a thread that does so
    # again and again is never asked for it by those who wait.
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    as_base64 = body.encoding_format == "base64"
    yield '{"object": "list", "data": ['
    for index, vector in enumerate(vectors.astype("<f4")):
        numbers = base64.b64encode(vector).decode() if as_base64 else vector.tolist()
        document = {"object": "embedding", "index": index, "embedding": numbers}
        yield f"{', ' if index else ''}{json.dumps(document)}"
    rest = {
        "model": context.embedding_model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    yield f"], {json.dumps(rest)[1:]}"
