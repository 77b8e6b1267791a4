"""POST /v1/chat/completions."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response

from tokendance.executor.step import TokenLogprobs
from tokendance.server.answers import Delta
from tokendance.server.auth import tenant_of
from tokendance.server.chat import constraint_of, encode_chat, is_marked
from tokendance.server.context import ServerContext
from tokendance.server.openapi import whole_or_stream
from tokendance.server.protocol import ChatRequest
from tokendance.server.respond import Answer, Ask, Endpoint, finish_reason, read_ask, respond
from tokendance.server.responses import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    StreamedTool,
    Usage,
)
from tokendance.server.tool_calls import ToolCall


def add_chat(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions", responses=whole_or_stream(ChatAnswer))
    async def chat(
        body: ChatRequest, request: Request, tenant: Annotated[str, Depends(tenant_of)]
    ) -> Response:
        """Answer a conversation."""
        return await respond(ChatEndpoint(context, tenant, body), request)


class ChatEndpoint(Endpoint[ChatRequest]):
    """A conversation that is answered."""

    kind = "chatcmpl"

    def __init__(self, context: ServerContext, tenant: str, body: ChatRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        # Of a stream: by answer, text that may become a call and is not sent as text.
        self._held: dict[int, str] = {}

    def read(self) -> Ask:
        """Make a prompt of the messages."""
        context, body = self.context, self.body
        prompt = encode_chat(
            body, self.encoder, context.tools, context.settings, context.max_characters
        )
        constraint = constraint_of(body, context.grammars, context.tools)
        return read_ask(context, body, [prompt], constraint, marked=is_marked(body))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatAnswer:
        """A message for each answer."""
        choices = []
        for index, answer in enumerate(answers):
            output = answer.output
            text, calls = self._split(output.text)
            message = AnswerMessage(role="assistant", content=text)
            if calls:
                called = [CalledTool(**_called(call)) for call in calls]
                message = AnswerMessage(role="assistant", content=text or None, tool_calls=called)
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(output.token_ids, answer.logprobs),
                    finish_reason="tool_calls" if calls else finish_reason(output),
                )
            )
        return ChatAnswer(**self.head, object="chat.completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[ChatChunk]:
        """The role first, then text and calls, and at last the reason why it has ended."""
        index, text = delta.index, delta.text
        chunks: list[ChatChunk] = []
        if index not in self._held:
            self._held[index] = ""
            chunks.append(self._chunk(index, ChatDelta(role="assistant", content="")))
        if self.body.may_call:
            self._held[index] += text
            text = ""
        if delta.logprobs:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            chunks.append(self._chunk(index, ChatDelta(content=text), logprobs=logprobs))
        elif text:
            chunks.append(self._chunk(index, ChatDelta(content=text)))
        if delta.output is None:
            return chunks
        text, calls = self._split(self._held[index])
        if text:
            chunks.append(self._chunk(index, ChatDelta(content=text)))
        if calls:
            called = [StreamedTool(index=at, **_called(call)) for at, call in enumerate(calls)]
            chunks.append(self._chunk(index, ChatDelta(tool_calls=called)))
        reason = "tool_calls" if calls else finish_reason(delta.output)
        chunks.append(self._chunk(index, ChatDelta(), finish_reason=reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """An event without a choice."""
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[], usage=usage)

    def _chunk(self, index: int, delta: ChatDelta, **fields: Any) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, **{"finish_reason": None, **fields})
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[choice])

    def _split(self, text: str) -> tuple[str, list[ToolCall]]:
        """An answer's words, and the calls that it makes."""
        return self.context.tools.split(text) if self.body.may_call else (text, [])

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.context.token_text(token)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        return {
            "content": [
                entry(token, chosen.logprob)
                | {"top_logprobs": [entry(other, logprob) for other, logprob in chosen.top]}
                for token, chosen in zip(token_ids, logprobs, strict=False)
            ],
            "refusal": None,
        }


def _called(call: ToolCall) -> dict[str, Any]:
    """Fields of a call as clients know it."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": CalledFunction(name=call.name, arguments=call.arguments),
    }
