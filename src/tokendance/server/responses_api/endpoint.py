"""POST /v1/responses, and what is remembered of it."""

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, TypeAdapter

from tokendance.errors import TokenDanceError
from tokendance.outputs import Output
from tokendance.server.chat import ChatEndpoint
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, as_api_error
from tokendance.server.jobs import Delta
from tokendance.server.protocol import ChatMessage
from tokendance.server.respond import Answer, usage_of
from tokendance.server.responses import Usage, dump
from tokendance.server.responses_api.as_chat import (
    as_chat,
    field_here,
    items_of,
    messages_of,
    text_here,
)
from tokendance.server.responses_api.bodies import (
    Item,
    ItemReference,
    ReadItem,
    Reasoning,
    ResponsesRequest,
    TextFormat,
)
from tokendance.server.responses_api.items import documents_of
from tokendance.server.responses_api.kept import KeptAnswer
from tokendance.server.responses_api.output import (
    GrowingOutput,
    ResponsesAnswer,
    ResponsesError,
    ResponsesUsage,
    Status,
)

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
# Bytes that an answer counts for beside its text.
_OVERHEAD = 1024


class ResponsesEndpoint(ChatEndpoint):
    """A chat request that came as one for a response, and is answered as such."""

    kind = "resp"

    def __init__(self, context: ServerContext, tenant: str, asked: ResponsesRequest) -> None:
        """Take a request; see `Endpoint`.

        Raises:
            ApiError: likewise, and if the answer before is not remembered, or nothing was said.
        """
        items = items_of(asked)
        if len(items) > (most := context.settings.max_messages):
            message = f"There are {len(items)} items, and at most {most} are taken."
            raise ApiError(413, message, param="input")
        self._items = _read(items, context, tenant)
        self._new = messages_of(self._items)
        earlier = context.kept_answers.messages(tenant, asked.previous_response_id)
        with _names_of_here():
            super().__init__(context, tenant, as_chat(asked, [*earlier, *self._new]))
        self._asked = asked
        self._id = self.head["id"].replace("-", "_")
        self._output = GrowingOutput()
        self._answer = self._document("in_progress")

    def read(self) -> None:
        """Encode the messages."""
        with _names_of_here():
            super().read()

    async def whole(self) -> BaseModel:
        """Wait for the answer, and make the document of it."""
        with _names_of_here():
            return await super().whole()

    def document(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The document that ends a stream."""
        del usage  # it is in the stream, too
        (answer,) = answers
        output = answer.output
        self.chunks(Delta(0, output.text, output.token_ids, tuple(answer.logprobs), output))
        return self._answer

    def chunks(self, delta: Delta) -> Sequence[BaseModel]:
        """Events of items as they grow, and at last the whole document."""
        if delta.index not in self._growing:
            self._growing[delta.index] = self._begin_answer()
        growing = self._growing[delta.index]
        logprobs = self._logprobs(delta.token_ids, delta.logprobs) or {"content": []}
        events = self._output.add(growing.add(delta.text), logprobs["content"])
        if delta.output is not None:
            events += self._output.add(growing.finish(delta.output))
            is_cut = growing.finish_reason(delta.output) == "length"
            status: Status = "incomplete" if is_cut else "completed"
            events += self._output.finish(status)
            outputs = [delta.output]
            usage = usage_of(outputs, 1, self.count_thoughts(outputs))
            self._answer = self._document(status, usage)
            self._add_tokens(delta.output)
            self._keep()
            events.append(self._output.event(status, response=self._answer))
        return events

    async def documents(self) -> AsyncIterator[dict[str, Any]]:
        """Two events that it has begun, then those of the answer."""
        for kind in ("created", "in_progress"):
            yield dump(self._output.event(kind, response=self._answer))
        async for document in super().documents():
            yield document

    async def events(self) -> AsyncIterator[str]:
        """`documents` as server-sent events; an error is the last of them."""
        try:
            with _names_of_here():
                async for document in self.documents():
                    yield _event(document)
        except ApiError as error:
            answer = self._document("failed")
            answer.error = ResponsesError(code=error.code or "server_error", message=str(error))
            yield _event(dump(self._output.event("failed", response=answer)))

    def _document(self, status: Status, usage: Usage | None = None) -> ResponsesAnswer:
        """What was asked, and what has come of it so far."""
        asked, chat = self._asked, self.body
        format_ = asked.text.format if asked.text is not None else None
        choice = asked.tool_choice
        return ResponsesAnswer(
            id=self._id,
            object="response",
            created_at=self.head["created"],
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            model=self.head["model"],
            output=list(self._output.items),
            usage=None if usage is None else ResponsesUsage.of(usage),
            error=None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=asked.previous_response_id,
            reasoning=(asked.reasoning or Reasoning()).model_dump(),
            store=asked.store is not False,
            temperature=1.0 if chat.temperature is None else chat.temperature,
            text={"format": (format_ or TextFormat()).model_dump(by_alias=True, exclude_none=True)},
            tool_choice=choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
            tools=[tool.model_dump() for tool in asked.tools or ()],
            top_logprobs=asked.top_logprobs or 0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            truncation="disabled",
            background=False,
        )

    def _add_tokens(self, output: Output) -> None:
        """Add to the document what was asked of tokens, as the answer of a chat has it."""
        if self.body.prompt_logprobs is not None:
            self._answer.prompt_logprobs = self.prompt_logprobs()
        if self.body.return_token_ids:
            self._answer.prompt_token_ids = self.prompt_ids()
            self._answer.token_ids = list(output.token_ids)

    def _keep(self) -> None:
        """Remember the answer, unless the client has said not to."""
        if self._asked.store is False:
            return
        document = dump(self._answer)
        said = messages_of(_read_all(document["output"]))
        items = documents_of(self._items)
        num_bytes = _OVERHEAD + len(json.dumps(document)) + sum(map(_size, self._new))
        num_bytes += len(json.dumps(items))
        messages, previous_id = [*self._new, *said], self._asked.previous_response_id
        answer = KeptAnswer(document, messages, previous_id, num_bytes, items)
        self.context.kept_answers.keep(self.tenant, self._id, answer)


def _read(items: Sequence[Item], context: ServerContext, tenant: str) -> list[ReadItem]:
    """Items, with those that they refer to in place of references."""
    ids = [item.id for item in items if isinstance(item, ItemReference)]
    documents = context.kept_answers.items(tenant, dict.fromkeys(ids))
    # A few bytes may refer to much, again and again: all of it is taken to have been sent.
    lengths = {item_id: _length(document) for item_id, document in documents.items()}
    length, most = sum(lengths[item_id] for item_id in ids), context.settings.max_body_bytes
    if length > most:
        message = (
            f"The items that are referred to have {length} characters, and a request has at most "
            f"{most} bytes. Refer to fewer."
        )
        raise ApiError(413, message, param="input")
    found = dict(zip(documents, _read_all(list(documents.values())), strict=True))
    return [found[item.id] if isinstance(item, ItemReference) else item for item in items]


def _length(value: Any) -> int:
    """Characters of all texts in a document."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str) else 1


def _read_all(documents: Sequence[dict[str, Any]]) -> list[ReadItem]:
    """Items that are remembered, of which none is a reference."""
    items = _ITEMS.validate_python(documents)
    return [item for item in items if not isinstance(item, ItemReference)]


def _size(message: ChatMessage) -> int:
    """About how many bytes a message takes."""
    calls = message.tool_calls or ()
    texts = [str(message.content or ""), *(call.function.arguments for call in calls)]
    return _OVERHEAD + 4 * sum(map(len, texts))


@contextmanager
def _names_of_here() -> Iterator[None]:
    """Have errors name the fields as they are called here."""
    try:
        yield
    except (ApiError, TokenDanceError) as error:
        told = as_api_error(error)
        message, param = text_here(told.message), field_here(told.param)
        raise replace(told, message=message, param=param) from error


def _event(document: dict[str, Any]) -> str:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n"
