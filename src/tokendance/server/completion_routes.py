"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response

from tokendance.errors import InputError
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answers import Delta
from tokendance.server.auth import tenant_of
from tokendance.server.chat import check_length
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.openapi import whole_or_stream
from tokendance.server.protocol import CompletionRequest
from tokendance.server.respond import (
    Answer,
    Ask,
    Endpoint,
    check_choices,
    finish_reason,
    read_ask,
    respond,
)
from tokendance.server.responses import TextAnswer, TextChoice, TextChunk, TextChunkChoice, Usage


def add_completions(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/completions", responses=whole_or_stream(TextAnswer))
    async def completions(
        body: CompletionRequest, request: Request, tenant: Annotated[str, Depends(tenant_of)]
    ) -> Response:
        """Go on with texts, or with token ids."""
        return await respond(CompletionEndpoint(context, tenant, body), request)


class CompletionEndpoint(Endpoint[CompletionRequest]):
    """Texts, or token ids, that go on."""

    kind = "cmpl"

    def read(self) -> Ask:
        """Encode the prompts."""
        prompts = _prompts(self.body)
        check_choices(self.context, self.body, len(prompts))  # before all of them are read
        for prompt in prompts:
            if isinstance(prompt, str):
                check_length([prompt], self.context.max_characters, "prompt")
        encoded = [_encode(self.encoder, prompt) for prompt in prompts]
        return read_ask(self.context, self.body, encoded)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> TextAnswer:
        """A text for each answer."""
        choices = [
            TextChoice(
                index=index,
                text=answer.output.text,
                logprobs=self._logprobs(answer),
                finish_reason=finish_reason(answer.output),
            )
            for index, answer in enumerate(answers)
        ]
        return TextAnswer(**self.head, object="text_completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[TextChunk]:
        """Text if there is any, and the reason why it has ended."""
        reason = None if delta.output is None else finish_reason(delta.output)
        if not delta.text and reason is None:
            return []
        choice = TextChunkChoice(
            index=delta.index, text=delta.text, logprobs=None, finish_reason=reason
        )
        return [TextChunk(**self.head, object="text_completion", choices=[choice])]

    def usage_chunk(self, usage: Usage) -> TextChunk:
        """An event without a choice."""
        return TextChunk(**self.head, object="text_completion", choices=[], usage=usage)

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not answer.logprobs:
            return None
        spell = self.context.token_text
        texts = [spell(token) for token in answer.output.token_ids]
        logprobs = answer.logprobs[: len(texts)]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [chosen.logprob for chosen in logprobs],
            "top_logprobs": [
                {spell(token): logprob for token, logprob in chosen.top} for chosen in logprobs
            ],
            "text_offset": offsets[:-1],
        }


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
