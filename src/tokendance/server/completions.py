"""POST /v1/completions."""

import itertools
from collections.abc import Sequence
from typing import Any

from tokendance.errors import InputError
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.chat_prompt import check_length
from tokendance.server.errors import bad_request
from tokendance.server.jobs import Delta
from tokendance.server.protocol import CompletionRequest
from tokendance.server.respond import Answer, PromptEndpoint, finish_reason
from tokendance.server.responses import TextAnswer, TextChoice, TextChunk, TextChunkChoice, Usage


class CompletionEndpoint(PromptEndpoint[CompletionRequest]):
    """A request for continuations of texts, or of token ids."""

    kind = "cmpl"
    prompt_field = "prompt"

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
                logprobs=self._logprobs(answer),
                finish_reason=finish_reason(answer.output),
            )
            for index, answer in enumerate(answers)
        ]
        return TextAnswer(**self.head, object="text_completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[TextChunk]:
        """Text if there is any, and the finish reason at the end."""
        reason = None if delta.output is None else finish_reason(delta.output)
        if not delta.text and reason is None:
            return []
        choice = TextChunkChoice(
            index=delta.index, text=delta.text, logprobs=None, finish_reason=reason
        )
        return [TextChunk(**self.head, object="text_completion", choices=[choice])]

    def usage_chunk(self, usage: Usage) -> TextChunk:
        """A chunk without choices."""
        return TextChunk(**self.head, object="text_completion", choices=[], usage=usage)

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not answer.logprobs:
            return None
        spell, logprobs = self.context.token_text, answer.logprobs
        texts = [spell(token) for token in answer.output.token_ids]
        offsets = list(itertools.accumulate(map(len, texts), initial=0))
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
