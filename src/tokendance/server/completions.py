"""POST /v1/completions."""

import itertools
from collections.abc import Sequence
from typing import Any

from tokendance.errors import InputError
from tokendance.executor.step import TokenLogprobs
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.chat_prompt import check_length
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.jobs import Delta
from tokendance.server.protocol import CompletionRequest
from tokendance.server.respond import Answer, PromptEndpoint, finish_reason
from tokendance.server.responses import TextAnswer, TextChoice, TextChunk, TextChunkChoice, Usage


class CompletionEndpoint(PromptEndpoint[CompletionRequest]):
    """A request for continuations of texts, or of token ids."""

    kind = "cmpl"
    prompt_field = "prompt"

    def __init__(self, context: ServerContext, tenant: str, body: CompletionRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        self._num_characters: dict[int, int] = {}  # in a stream, by answer, of tokens sent

    def read(self) -> None:
        """Encode the prompts."""
        prompts = _prompts(self.body)
        self.check_choices(len(prompts))
        for prompt in prompts:
            if isinstance(prompt, str):
                check_length([prompt], self.context.max_characters, "prompt")
        self.add_jobs(self.body, [self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str | list[int]) -> EncodedPrompt:
        content = strip_separator(prompt) if isinstance(prompt, str) else prompt
        try:
            return self.encoder.encode(Prompt(content))
        except InputError as error:
            raise bad_request(str(error), "prompt") from error

    def document(self, answers: Sequence[Answer], usage: Usage) -> TextAnswer:
        """A choice for each answer."""
        choices = [
            TextChoice(
                index=index,
                text=answer.output.text,
                logprobs=self._logprobs(answer.output.token_ids, answer.logprobs),
                finish_reason=finish_reason(answer.output),
            )
            for index, answer in enumerate(answers)
        ]
        return TextAnswer(**self.head, object="text_completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[TextChunk]:
        """Text if there is any, and the finish reason at the end."""
        reason = None if delta.output is None else finish_reason(delta.output)
        if not delta.text and not delta.logprobs and reason is None:
            return []
        begin = self._num_characters.get(delta.index, 0)
        logprobs = self._logprobs(delta.token_ids, delta.logprobs, begin)
        if logprobs is not None:
            self._num_characters[delta.index] = begin + sum(map(len, logprobs["tokens"]))
        choice = TextChunkChoice(
            index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=reason
        )
        return [TextChunk(**self.head, object="text_completion", choices=[choice])]

    def usage_chunk(self, usage: Usage) -> TextChunk:
        """A chunk without choices."""
        return TextChunk(**self.head, object="text_completion", choices=[], usage=usage)

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], begin: int = 0
    ) -> dict[str, Any] | None:
        """Log-probabilities of tokens whose text begins after so many characters."""
        if not logprobs:
            return None
        spell = self.context.token_text
        texts = [spell(token) for token in token_ids]
        offsets = list(itertools.accumulate(map(len, texts), initial=begin))
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
