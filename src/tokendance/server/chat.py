"""POST /v1/chat/completions."""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.rounds.prompts import SEPARATOR
from tokendance.server.call_parser import (
    Arguments,
    Call,
    CallBegins,
    CallParser,
    Piece,
    Text,
    join,
)
from tokendance.server.chat_prompt import encode_chat, texts_of
from tokendance.server.chat_wanted import wanted_of
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError
from tokendance.server.jobs import Delta
from tokendance.server.protocol import ChatRequest
from tokendance.server.respond import Answer, PromptEndpoint, finish_reason, header_value
from tokendance.server.responses import (
    AnswerMessage,
    CalledFunction,
    CalledTool,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    FinishReason,
    MoreArguments,
    StreamedTool,
    Usage,
)


class ChatEndpoint(PromptEndpoint[ChatRequest]):
    """A request for answers to a conversation."""

    kind = "chatcmpl"

    def __init__(self, context: ServerContext, tenant: str, body: ChatRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        self._wanted = wanted_of(body)
        self._names = [tool.name for tool in self._wanted.tools] if self._wanted else []
        self._growing: dict[int, _GrowingAnswer] = {}  # in a stream, by answer

    def read(self) -> None:
        """Encode the messages."""
        context, body = self.context, self.body
        count, most = len(body.messages), context.settings.max_messages
        if count > most:
            message = f"There are {count} messages, and at most {most} are taken."
            raise ApiError(413, message, param="messages")
        if body.logprobs:
            context.token_bytes(0)  # reads the tokenizer, once
        # First, since tools that are refused here would take long to list in the prompt.
        constraint = None
        if self._wanted is not None:
            fitted = context.grammars.answer(self._wanted, context.tools, self.tenant)
            constraint = fitted.constraint
            if fitted.unheld:
                self.headers["X-TokenDance-Not-Held"] = header_value("; ".join(fitted.unheld))
        prompt = encode_chat(body, self.encoder, context.tools, context.max_characters)
        self.check_choices(1)
        # Separators in the messages mark their shared blocks.
        marked = any(SEPARATOR in text for message in body.messages for text in texts_of(message))
        self.add_jobs(body, [prompt], constraint=constraint, marked=marked)

    def document(self, answers: Sequence[Answer], usage: Usage) -> ChatAnswer:
        """A choice for each answer."""
        choices = []
        for index, answer in enumerate(answers):
            output = answer.output
            growing = self._begin_answer()
            text, calls = join([*growing.add(output.text), *growing.finish(output)])
            message = AnswerMessage(role="assistant", content=text)
            if calls:
                message.content = text or None
                message.tool_calls = [_called(call) for call in calls]
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(output.token_ids, answer.logprobs),
                    finish_reason=growing.finish_reason(output),
                )
            )
        return ChatAnswer(**self.head, object="chat.completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[ChatChunk]:
        """The role first, then text and calls as they grow, and at last the finish reason."""
        index = delta.index
        choices: list[ChatChunkChoice] = []

        def add(delta: ChatDelta, **fields: Any) -> None:
            fields = {"finish_reason": None, **fields}
            choices.append(ChatChunkChoice(index=index, delta=delta, **fields))

        if index not in self._growing:
            self._growing[index] = self._begin_answer()
            add(ChatDelta(role="assistant", content=""))
        growing = self._growing[index]
        deltas = growing.deltas(growing.add(delta.text))
        if delta.logprobs:
            # They go with the text, though it may be held back.
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            first = deltas.pop(0) if deltas and deltas[0].content else ChatDelta(content="")
            add(first, logprobs=logprobs)
        if delta.output is not None:
            deltas += growing.deltas(growing.finish(delta.output))
        for one in deltas:
            add(one)
        if delta.output is not None:
            add(ChatDelta(), finish_reason=growing.finish_reason(delta.output))
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=choices, **fields)

    def _begin_answer(self) -> "_GrowingAnswer":
        parser = CallParser(self.context.tools, self._names) if self._names else None
        return _GrowingAnswer(parser)

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.context.token_text(token)
            return {
                "token": text,
                "logprob": max(logprob, -9999.0),
                "bytes": list(self.context.token_bytes(token)),
            }

        return {
            "content": [
                entry(token, chosen.logprob)
                | {"top_logprobs": [entry(other, logprob) for other, logprob in chosen.top]}
                for token, chosen in zip(token_ids, logprobs, strict=False)
            ],
            "refusal": None,
        }


class _GrowingAnswer:
    """One answer as it grows: its text, and the calls in it if it may have any."""

    def __init__(self, parser: CallParser | None) -> None:
        self._parser = parser
        self._num_calls = 0

    def add(self, text: str) -> list[Piece]:
        """Go on; return what is sure by now."""
        if self._parser is not None:
            return self._parser.add(text)
        return [Text(text)] if text else []

    def finish(self, output: Output) -> list[Piece]:
        """The rest, when all of its text was added."""
        if self._parser is None:
            return []
        return self._parser.finish(is_cut=output.finish_reason == "length")

    def deltas(self, pieces: Sequence[Piece]) -> list[ChatDelta]:
        """Pieces as a stream has them."""
        deltas = []
        for piece in pieces:
            match piece:
                case Text():
                    deltas.append(ChatDelta(content=piece.text))
                case CallBegins():
                    call = _called(Call(piece.name, "")).model_dump()
                    deltas.append(
                        ChatDelta(tool_calls=[StreamedTool(index=self._num_calls, **call)])
                    )
                    self._num_calls += 1
                case Arguments():
                    more = MoreArguments(arguments=piece.text)
                    tool = StreamedTool(index=self._num_calls - 1, function=more)
                    deltas.append(ChatDelta(tool_calls=[tool]))
        return deltas

    def finish_reason(self, output: Output) -> Literal[FinishReason, "tool_calls"]:
        """Why it has ended; a call that is not whole is no reason."""
        parser, reason = self._parser, finish_reason(output)
        if parser is None or not parser.num_calls or parser.is_in_call:
            return reason
        return reason if reason == "length" and not parser.ends_with_call else "tool_calls"


def _called(call: Call) -> CalledTool:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return CalledTool(id=f"call_{secrets.token_hex(12)}", type="function", function=function)
