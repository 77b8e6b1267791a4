"""POST /v1/completions."""

import itertools
from collections.abc import Sequence
from typing import Any

from tokendance.errors import InputError
from tokendance.executor.step import TokenLogprobs
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.chat_prompt import check_length
from tokendance.server.chat_wanted import wanted_text
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.jobs import Delta
from tokendance.server.protocol import CompletionRequest
from tokendance.server.respond import LEAST_LOGPROB, Answer, PromptEndpoint, finish_reason
from tokendance.server.responses import TextAnswer, TextChoice, TextChunk, TextChunkChoice, Usage


class CompletionEndpoint(PromptEndpoint[CompletionRequest]):
    """A request for continuations of texts, or of token ids."""

    kind = "cmpl"
    prompt_field = "prompt"

    def __init__(self, context: ServerContext, tenant: str, body: CompletionRequest) -> None:
        """Take a request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        self._wanted = wanted_text(body)
        self._prompts: list[str | list[int]] = []
        self._num_characters: dict[int, int] = {}  # in a stream, by answer, of tokens sent

    def read(self) -> None:
        """Encode the prompts."""
        constraint = None
        if self._wanted is not None:
            constraint = self.constrain(self._wanted)
        prompts = self._prompts = _prompts(self.body)
        self.check_choices(len(prompts))
        for prompt in prompts:
            if isinstance(prompt, str):
                check_length([prompt], self.context.max_characters, "prompt")
        encoded = [self._encode(prompt) for prompt in prompts]
        self.add_jobs(self.body, encoded, constraint=constraint)

    def _encode(self, prompt: str | list[int]) -> EncodedPrompt:
        content = strip_separator(prompt) if isinstance(prompt, str) else prompt
        try:
            return self.encoder.encode(Prompt(content))
        except InputError as error:
            raise bad_request(str(error), "prompt") from error

    def document(self, answers: Sequence[Answer], usage: Usage) -> TextAnswer:
        """A choice for each answer."""
        choices = []
        for index, answer in enumerate(answers):
            output = answer.output
            choice = TextChoice(
                index=index,
                text=self._echo(index) + output.text,
                logprobs=self._logprobs(index, output.token_ids, answer.logprobs, is_first=True),
                finish_reason=finish_reason(output),
            )
            if self.body.prompt_logprobs is not None:
                choice.prompt_logprobs = self.prompt_logprobs(index)
            if self.body.return_token_ids:
                choice.prompt_token_ids = self.prompt_ids(index)
                choice.token_ids = list(output.token_ids)
            choices.append(choice)
        return TextAnswer(**self.head, object="text_completion", choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> list[TextChunk]:
        """Text if there is any, and the finish reason at the end."""
        index, body = delta.index, self.body
        reason = None if delta.output is None else finish_reason(delta.output)
        is_first = index not in self._num_characters
        text = self._echo(index) + delta.text if is_first else delta.text
        shows_ids = bool(body.return_token_ids and (delta.token_ids or is_first))
        if not text and not delta.logprobs and not shows_ids and reason is None:
            return []
        begin = self._num_characters.setdefault(index, 0)
        logprobs = self._logprobs(
            index, delta.token_ids, delta.logprobs, begin=begin, is_first=is_first
        )
        if logprobs is not None:
            self._num_characters[index] = begin + sum(map(len, logprobs["tokens"]))
        choice = TextChunkChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        if shows_ids:
            choice.token_ids = list(delta.token_ids)
            if is_first:
                choice.prompt_token_ids = self.prompt_ids(index)
        return [TextChunk(**self.head, object="text_completion", choices=[choice])]

    def usage_chunk(self, usage: Usage) -> TextChunk:
        """A chunk without choices."""
        return TextChunk(**self.head, object="text_completion", choices=[], usage=usage)

    def _echo(self, index: int) -> str:
        """The prompt of an answer, if it is to stand before it."""
        if not self.body.echo:
            return ""
        prompt = self._prompts[index // (self.body.n or 1)]
        return strip_separator(prompt) if isinstance(prompt, str) else self.encoder.decode(prompt)

    def _logprobs(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        *,
        begin: int = 0,
        is_first: bool = False,
    ) -> dict[str, Any] | None:
        """Log-probabilities of more tokens of an answer, the prompt's before the first.

        Args:
            index: of the answer.
            token_ids: of its tokens.
            logprobs: of these tokens.
            begin: characters before their text.
            is_first: whether they are its first.
        """
        if self.body.logprobs is None:
            return None
        all_logprobs: list[TokenLogprobs | None] = [*logprobs]
        if self.body.echo and is_first:
            # The first token of a prompt has nothing before it.
            all_logprobs = [None, *self.jobs[index].request.prompt_logprobs, *logprobs]
            token_ids = [*self.prompt_ids(index), *token_ids]
        if not all_logprobs:
            return None
        spell, most = self.context.token_text, self.body.logprobs
        texts = [spell(token) for token in token_ids]
        offsets = list(itertools.accumulate(map(len, texts), initial=begin))
        return {
            "tokens": texts,
            "token_logprobs": [
                None if one is None else max(one.logprob, LEAST_LOGPROB) for one in all_logprobs
            ],
            # Where two tokens are spelled alike, the likelier is meant.
            "top_logprobs": [
                None
                if one is None
                else {
                    spell(token): max(logprob, LEAST_LOGPROB)
                    for token, logprob in reversed(one.top[:most])
                }
                for one in all_logprobs
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
