"""POST /v1/completions."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response

from tokendance.errors import InputError
from tokendance.executor.step import TokenLogprobs
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import Output
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answers import Delta
from tokendance.server.auth import tenant_of
from tokendance.server.chat import check_length
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.jobs import Job
from tokendance.server.openapi import TextAnswer, whole_or_stream
from tokendance.server.protocol import CompletionRequest
from tokendance.server.running import Ask, answer, check_choices, read_ask


def add_completions(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/completions", responses=whole_or_stream(TextAnswer))
    async def completions(
        body: CompletionRequest, request: Request, tenant: Annotated[str, Depends(tenant_of)]
    ) -> Response:
        """Go on with texts, or with token ids."""
        context.check_model(body.model)
        encoder = context.encoder(tenant)
        head = {**context.head("cmpl"), "object": "text_completion"}

        def read() -> Ask:
            given = _prompts(body)
            check_choices(context, body, len(given))  # before all of them are read
            for one in given:
                if isinstance(one, str):
                    check_length([one], context.max_characters, "prompt")
            prompts = [_encode(encoder, prompt) for prompt in given]
            return read_ask(context, body, prompts)

        def whole(
            jobs: list[Job], outputs: list[Output], logprobs: list[list[TokenLogprobs]]
        ) -> dict[str, Any]:
            del jobs
            choices = [
                {
                    "index": index,
                    "text": output.text,
                    "logprobs": _completion_logprobs(context, output, logprobs[index]),
                    "finish_reason": output.finish_reason,
                }
                for index, output in enumerate(outputs)
            ]
            return {**head, "choices": choices}

        def chunks(jobs: list[Job]) -> Callable[[Delta], list[dict[str, Any]]]:
            del jobs

            def of(delta: Delta) -> list[dict[str, Any]]:
                reason = None if delta.output is None else delta.output.finish_reason
                if not delta.text and reason is None:
                    return []
                choice = {
                    "index": delta.index,
                    "text": delta.text,
                    "logprobs": None,
                    "finish_reason": reason,
                }
                return [{**head, "choices": [choice]}]

            return of

        return await answer(context, tenant, request, body, read, whole, chunks, head)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt is empty.", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(encoder: PromptEncoder, prompt: str | list[int]) -> EncodedPrompt:
    try:
        if isinstance(prompt, str):
            prompt = strip_separator(prompt)
        return encoder.encode(Prompt(prompt))
    except InputError as error:
        raise bad_request(str(error), "prompt") from error


def _completion_logprobs(
    context: ServerContext, output: Output, logprobs: list[TokenLogprobs]
) -> dict[str, Any] | None:
    if not logprobs:
        return None
    texts = [context.token_text(token) for token in output.token_ids]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in logprobs[: len(texts)]],
        "top_logprobs": [
            {context.token_text(token): value for token, value in one.top}
            for one in logprobs[: len(texts)]
        ],
        "text_offset": offsets[:-1],
    }
