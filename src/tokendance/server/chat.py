"""POST /v1/chat/completions."""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from tokendance.executor.step import TokenLogprobs
from tokendance.models.thoughts import Said, Standing, ThoughtParser
from tokendance.outputs import Output
from tokendance.rounds.prompts import SEPARATOR
from tokendance.server.call_parser import (
    Arguments,
    Call,
    CallBegins,
    CallParser,
    Piece,
    Text,
    Thought,
    join,
)
from tokendance.server.chat_prompt import encode_chat, standing_of, texts_of
from tokendance.server.chat_wanted import wanted_of
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError
from tokendance.server.grammar_constraint import AnswerConstraint
from tokendance.server.jobs import Delta
from tokendance.server.protocol import ChatRequest
from tokendance.server.respond import LEAST_LOGPROB, Answer, PromptEndpoint, finish_reason
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
from tokendance.server.thinking_constraint import ThinkingConstraint


class ChatEndpoint(PromptEndpoint[ChatRequest]):
    """A request for answers to a conversation."""

    kind = "chatcmpl"

    def __init__(self, context: ServerContext, tenant: str, body: ChatRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        self._wanted = wanted_of(body)
        self._names = [tool.name for tool in self._wanted.tools] if self._wanted else []
        self._growing: dict[int, _GrowingAnswer] = {}  # in a stream, by answer
        self._standing = Standing.BEHIND  # where answers begin

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
        behind = None if self._wanted is None else self.constrain(self._wanted)
        prompt = encode_chat(body, self.encoder, context.tools, context.max_characters)
        self._standing = standing_of(body, prompt, self.encoder)
        constraint: AnswerConstraint | None = behind
        marks = self.encoder.thought_marks
        if behind is not None and marks is not None and self._standing is not Standing.BEHIND:
            constraint = ThinkingConstraint(behind, marks, self._standing)
        self.check_choices(1)
        # Separators in the messages mark their shared blocks.
        marked = any(SEPARATOR in text for message in body.messages for text in texts_of(message))
        self.add_jobs(body, [prompt], constraint=constraint, marked=marked)

    def document(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """A choice for each answer."""
        choices = []
        for index, answer in enumerate(answers):
            output = answer.output
            growing = self._begin_answer()
            pieces = [*growing.add(output.text), *growing.finish(output)]
            text, calls = join(pieces)
            message = AnswerMessage(role="assistant", content=text)
            if thought := "".join(one.text for one in pieces if isinstance(one, Thought)):
                message.reasoning_content = message.reasoning = thought
            if calls:
                message.content = text or None
                message.tool_calls = [_called(call) for call in calls]
            choice = ChatChoice(
                index=index,
                message=message,
                logprobs=self._logprobs(output.token_ids, answer.logprobs),
                finish_reason=growing.finish_reason(output),
            )
            if self.body.return_token_ids:
                choice.token_ids = list(output.token_ids)
            choices.append(choice)
        document = ChatAnswer(**self.head, object="chat.completion", choices=choices, usage=usage)
        if self.body.prompt_logprobs is not None:
            document.prompt_logprobs = self.prompt_logprobs()
        if self.body.return_token_ids:
            document.prompt_token_ids = self.prompt_ids()
        return document

    def chunks(self, delta: Delta) -> Sequence[BaseModel]:
        """The role first, then text and calls as they grow, and at last the finish reason."""
        index = delta.index
        choices: list[ChatChunkChoice] = []

        def add(delta: ChatDelta, **fields: Any) -> None:
            fields = {"finish_reason": None, **fields}
            choices.append(ChatChunkChoice(index=index, delta=delta, **fields))

        is_first = index not in self._growing
        if is_first:
            self._growing[index] = self._begin_answer()
            add(ChatDelta(role="assistant", content=""))
        growing = self._growing[index]
        deltas = growing.deltas(growing.add(delta.text))
        ids = {"token_ids": list(delta.token_ids)} if self.body.return_token_ids else {}
        if delta.logprobs or (ids and delta.token_ids):
            # They go with the text, though it may be held back.
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            first = deltas.pop(0) if deltas and not deltas[0].tool_calls else ChatDelta(content="")
            add(first, **({} if logprobs is None else {"logprobs": logprobs}), **ids)
        if delta.output is not None:
            deltas += growing.deltas(growing.finish(delta.output))
        for one in deltas:
            add(one)
        if delta.output is not None:
            add(ChatDelta(), finish_reason=growing.finish_reason(delta.output))
        chunks = [self._chunk([choice]) for choice in choices]
        if is_first and self.body.return_token_ids:
            chunks[0].prompt_token_ids = self.prompt_ids()
        return chunks

    def count_thoughts(self, outputs: Sequence[Output]) -> int | None:
        """Tokens of the answers that are thoughts, if the model thinks."""
        encoder = self.encoder
        if encoder.thought_marks is None:
            return None
        return sum(encoder.count_thoughts(self._standing, one.token_ids) for one in outputs)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=choices, **fields)

    def _begin_answer(self) -> "_GrowingAnswer":
        parser = CallParser(self.context.tools, self._names) if self._names else None
        if not self.body.share_reasoning:
            return _GrowingAnswer(parser, self.encoder.thought_parser(self._standing))
        # The template has written the mark of thoughts that stay in the text.
        marks, is_begun = self.encoder.thought_marks, self._standing is Standing.INSIDE
        begun = f"{marks.begin}\n" if marks is not None and is_begun else ""
        return _GrowingAnswer(parser, None, begun)

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.context.token_text(token)
            return {
                "token": text,
                "logprob": max(logprob, LEAST_LOGPROB),
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
    """One answer as it grows: its thoughts and its text, and the calls in it if it may have any."""

    def __init__(
        self, parser: CallParser | None, thoughts: ThoughtParser | None, begun: str = ""
    ) -> None:
        self._parser = parser
        self._thoughts = thoughts
        self._begun = begun  # text that goes before the answer's own
        self._num_calls = 0

    def add(self, text: str) -> list[Piece]:
        """Go on; return what is sure by now."""
        begun, self._begun = self._begun, ""
        return self._say(
            Said("", begun + text) if self._thoughts is None else self._thoughts.add(text)
        )

    def finish(self, output: Output) -> list[Piece]:
        """The rest, when all of its text was added."""
        is_cut = output.finish_reason == "length"
        pieces = [] if self._thoughts is None else self._say(self._thoughts.finish(is_cut=is_cut))
        return pieces if self._parser is None else pieces + self._parser.finish(is_cut=is_cut)

    def _say(self, said: Said) -> list[Piece]:
        pieces: list[Piece] = [Thought(said.thought)] if said.thought else []
        if self._parser is not None:
            return pieces + self._parser.add(said.text)
        return [*pieces, Text(said.text)] if said.text else pieces

    def deltas(self, pieces: Sequence[Piece]) -> list[ChatDelta]:
        """Pieces as a stream has them."""
        deltas = []
        for piece in pieces:
            match piece:
                case Text():
                    deltas.append(ChatDelta(content=piece.text))
                case Thought():
                    more = piece.text
                    deltas.append(ChatDelta(reasoning_content=more, reasoning=more))
                case CallBegins():
                    call = _called(Call(piece.name, "")).model_dump()
                    deltas.append(
                        ChatDelta(tool_calls=[StreamedTool(index=self._num_calls, **call)])
                    )
                    self._num_calls += 1
                case Arguments():
                    arguments = MoreArguments(arguments=piece.text)
                    tool = StreamedTool(index=self._num_calls - 1, function=arguments)
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
