"""Answers of /v1/responses: their documents, and items that grow with the events that tell of it.

response.created, response.in_progress
for each item     response.output_item.added
a message     response.content_part.added, ...output_text.delta ..., ...output_text.done,
response.content_part.done
a call        response.function_call_arguments.delta ..., ...function_call_arguments.done
response.output_item.done
response.completed, response.incomplete or response.failed
"""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tokendance.server.call_parser import Arguments, CallBegins, Piece, Text, Thought
from tokendance.server.responses import PromptLogprobs, Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputDetails(BaseModel):
    """Of the prompt's tokens, those that were not computed; see `CachedTokens`."""

    cached_tokens: int
    cache_write_tokens: int = 0
    approximate_tokens: int = 0


class OutputDetails(BaseModel):
    """Of the answer's tokens, those that it was thought with."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ResponsesUsage":
        """The same with the names that it has here."""
        details = usage.prompt_tokens_details
        thoughts = usage.completion_tokens_details
        num_thoughts = 0 if thoughts is None else thoughts.reasoning_tokens
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(
                cached_tokens=details.cached_tokens,
                cache_write_tokens=0,
                approximate_tokens=details.approximate_tokens,
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=num_thoughts),
            total_tokens=usage.total_tokens,
        )


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]]


class ReasoningText(BaseModel):
    """The text of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """What a model has thought before it says something."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    status: Status
    content: list[ReasoningText]


class OutputMessage(BaseModel):
    """What a model says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that an answer makes."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputReasoning | OutputMessage | OutputCall


class ResponsesError(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class ResponsesAnswer(BaseModel):
    """Answer of /v1/responses: what was asked, and what came of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None
    error: ResponsesError | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    background: bool
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Deleted(BaseModel):
    """That an answer has been forgotten."""

    id: str
    object: Literal["response"]
    deleted: bool


class Event(BaseModel):
    """An event of a stream; its other fields are those that its type has at OpenAI."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class GrowingOutput:
    """The items of one answer, as it grows.

    Attributes:
        items: begun so far; all but the last are done.
    """

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._num_events = 0
        self._is_open = False  # the last item
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not gone out

    def event(self, kind: str, **fields: Any) -> Event:
        """The next event."""
        self._num_events += 1
        return Event(type=f"response.{kind}", sequence_number=self._num_events - 1, **fields)

    def add(self, pieces: Sequence[Piece], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Go on; return the events that tell of it.

        Args:
            pieces: of the answer.
            logprobs: of the tokens that they were read from; they go out with text, and those of
                thoughts and calls do not.
        """
        self._logprobs += logprobs
        events: list[Event] = []
        for piece in pieces:
            if not isinstance(piece, Text):
                self._logprobs = []
            match piece:
                case Text():
                    if not isinstance(self._last(), OutputMessage):
                        events += self._close("completed") + self._begin_message()
                    events.append(self._more_text(piece.text))
                case Thought():
                    if not isinstance(self._last(), OutputReasoning):
                        events += self._close("completed") + self._begin_reasoning()
                    events.append(self._more_thought(piece.text))
                case CallBegins():
                    events += self._close("completed")
                    events += self._begin(
                        OutputCall(
                            id=_new_id("fc"),
                            type="function_call",
                            call_id=_new_id("call"),
                            name=piece.name,
                            arguments="",
                            status="in_progress",
                        )
                    )
                case Arguments():
                    events.append(self._more_arguments(piece.text))
        return events

    def finish(self, status: Status) -> list[Event]:
        """End the last item; an answer without any has an empty message."""
        events = [] if self.items else self._begin_message()
        return events + self._close(status)

    def _last(self) -> OutputItem | None:
        return self.items[-1] if self._is_open else None

    def _place(self, item: OutputItem) -> dict[str, Any]:
        place = {"output_index": len(self.items) - 1, "item_id": item.id}
        return place if isinstance(item, OutputCall) else place | {"content_index": 0}

    def _begin(self, item: OutputItem) -> list[Event]:
        self.items.append(item)
        self._is_open = True
        index = len(self.items) - 1
        return [self.event("output_item.added", output_index=index, item=item.model_copy())]

    def _begin_message(self) -> list[Event]:
        message = OutputMessage(
            id=_new_id("msg"), type="message", role="assistant", status="in_progress", content=[]
        )
        events = self._begin(message)
        message.content = [_no_text()]
        place = self._place(message)
        return [*events, self.event("content_part.added", **place, part=_no_text())]

    def _begin_reasoning(self) -> list[Event]:
        thoughts = OutputReasoning(
            id=_new_id("rs"), type="reasoning", summary=[], status="in_progress", content=[]
        )
        events = self._begin(thoughts)
        thoughts.content = [ReasoningText(type="reasoning_text", text="")]
        place = self._place(thoughts)
        part = ReasoningText(type="reasoning_text", text="")
        return [*events, self.event("content_part.added", **place, part=part)]

    def _more_thought(self, text: str) -> Event:
        thoughts = self.items[-1]
        assert isinstance(thoughts, OutputReasoning)
        thoughts.content[0].text += text
        return self.event("reasoning_text.delta", **self._place(thoughts), delta=text)

    def _more_text(self, text: str) -> Event:
        message = self.items[-1]
        assert isinstance(message, OutputMessage)
        message.content[0].text += text
        message.content[0].logprobs += self._logprobs
        logprobs, self._logprobs = self._logprobs, []
        place = self._place(message)
        return self.event("output_text.delta", **place, delta=text, logprobs=logprobs)

    def _more_arguments(self, text: str) -> Event:
        call = self.items[-1]
        assert isinstance(call, OutputCall)
        call.arguments += text
        return self.event("function_call_arguments.delta", **self._place(call), delta=text)

    def _close(self, status: Status) -> list[Event]:
        """End the last item, if it is open."""
        item = self._last()
        if item is None:
            return []
        self._is_open = False
        item.status = status
        place = self._place(item)
        events: list[Event] = []
        match item:
            case OutputMessage():
                (said,) = item.content
                said.logprobs += self._logprobs
                self._logprobs = []
                text, logprobs = said.text, said.logprobs
                events += [
                    self.event("output_text.done", **place, text=text, logprobs=logprobs),
                    self.event("content_part.done", **place, part=said),
                ]
            case OutputReasoning():
                (thought,) = item.content
                events += [
                    self.event("reasoning_text.done", **place, text=thought.text),
                    self.event("content_part.done", **place, part=thought),
                ]
            case OutputCall():
                told = {"name": item.name, "arguments": item.arguments}
                events.append(self.event("function_call_arguments.done", **place, **told))
        index = place["output_index"]
        return [*events, self.event("output_item.done", output_index=index, item=item)]


def _no_text() -> OutputText:
    return OutputText(type="output_text", text="", annotations=[], logprobs=[])


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
