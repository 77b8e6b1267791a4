"""POST /v1/chat/completions."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response

from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.server.answers import Delta
from tokendance.server.auth import tenant_of
from tokendance.server.chat import constraint_of, encode_chat, is_marked
from tokendance.server.context import ServerContext
from tokendance.server.jobs import Job
from tokendance.server.openapi import ChatAnswer, whole_or_stream
from tokendance.server.protocol import ChatRequest
from tokendance.server.running import Ask, answer, read_ask
from tokendance.server.tool_calls import ToolCall


def add_chat(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions", responses=whole_or_stream(ChatAnswer))
    async def chat(
        body: ChatRequest, request: Request, tenant: Annotated[str, Depends(tenant_of)]
    ) -> Response:
        """Answer a conversation."""
        context.check_model(body.model)
        encoder = context.encoder(tenant)
        head = context.head("chatcmpl")
        chunk_head = {**head, "object": "chat.completion.chunk"}

        def read() -> Ask:
            prompt = encode_chat(
                body, encoder, context.tools, context.settings, context.max_characters
            )
            return read_ask(
                context,
                body,
                [prompt],
                constraint_of(body, context.grammars, context.tools),
                marked=is_marked(body),
            )

        def whole(
            jobs: list[Job], outputs: list[Output], logprobs: list[list[TokenLogprobs]]
        ) -> dict[str, Any]:
            choices = []
            for index, (output, job) in enumerate(zip(outputs, jobs, strict=True)):
                content, calls = _content(context, body, output.text)
                message: dict[str, Any] = {"role": "assistant", "content": content}
                if calls:
                    message["content"] = content or None
                    message["tool_calls"] = [call.as_openai() for call in calls]
                choices.append(
                    {
                        "index": index,
                        "message": message,
                        "logprobs": _chat_logprobs(context, job, output.token_ids, logprobs[index]),
                        "finish_reason": "tool_calls" if calls else output.finish_reason,
                    }
                )
            return {**head, "object": "chat.completion", "choices": choices}

        def chunks(jobs: list[Job]) -> Callable[[Delta], list[dict[str, Any]]]:
            begun: set[int] = set()
            held = [""] * len(jobs)  # text that may become a call is not sent as text

            def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
                choice = {"index": index, "delta": delta, "finish_reason": None, **more}
                return {**chunk_head, "choices": [choice]}

            def of(delta: Delta) -> list[dict[str, Any]]:
                found: list[dict[str, Any]] = []
                if delta.index not in begun:
                    begun.add(delta.index)
                    found.append(chunk(delta.index, {"role": "assistant", "content": ""}))
                more: dict[str, Any] = {}
                if delta.logprobs:
                    job = jobs[delta.index]
                    more["logprobs"] = _chat_logprobs(
                        context, job, delta.token_ids, list(delta.logprobs)
                    )
                text = delta.text
                if body.may_call:
                    held[delta.index] += text
                    text = ""
                if text or more:
                    found.append(chunk(delta.index, {"content": text}, **more))
                if delta.output is None:
                    return found
                reason = delta.output.finish_reason
                if body.may_call:
                    content, calls = _content(context, body, held[delta.index])
                    if content:
                        found.append(chunk(delta.index, {"content": content}))
                    if calls:
                        reason = "tool_calls"
                        listed = [call.as_openai(place) for place, call in enumerate(calls)]
                        found.append(chunk(delta.index, {"tool_calls": listed}))
                found.append(chunk(delta.index, {}, finish_reason=reason))
                return found

            return of

        return await answer(context, tenant, request, body, read, whole, chunks, chunk_head)


def _content(context: ServerContext, body: ChatRequest, text: str) -> tuple[str, list[ToolCall]]:
    return context.tools.split(text) if body.may_call else (text, [])


def _chat_logprobs(
    context: ServerContext, job: Job, token_ids: Sequence[int], logprobs: list[TokenLogprobs]
) -> dict[str, Any] | None:
    if job.request.params.top_logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = context.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return {
        "content": [
            entry(token, one.logprob)
            | {"top_logprobs": [entry(other, value) for other, value in one.top]}
            for token, one in zip(token_ids, logprobs, strict=False)
        ],
        "refusal": None,
    }
