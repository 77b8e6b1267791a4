"""Makes the engine's requests of prompts."""

import secrets

from tokendance.engine.request import Request, whose
from tokendance.errors import ContextError, PromptError, TokenDanceError
from tokendance.fidelity.shadow import Shadows
from tokendance.models.encoder import PromptEncoder
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import PromptLike, as_prompt
from tokendance.rounds.segments import EncodedPrompt, make_salt
from tokendance.store.entries import RoundId


class RequestMaker:
    """Makes requests for one engine."""

    def __init__(
        self, model: LoadedModel, encoder: PromptEncoder, shadows: Shadows, options: EngineOptions
    ) -> None:
        """Make requests for a model; shadows choose whom they will compute again."""
        self._model = model
        self._encoder = encoder
        self._shadows = shadows
        self._options = options

    def make(
        self,
        prompt: PromptLike,
        params: SamplingParams,
        round_id: RoundId,
        name: str,
        *,
        in_round: bool = True,
    ) -> Request:
        """Encode a prompt into a request. A prompt that cannot be run has its `error` set."""
        prompt = as_prompt(prompt)
        error: TokenDanceError | None = None
        try:
            encoded = self._encoder.encode(prompt)
        except PromptError as reason:
            encoded, error = EncodedPrompt((), make_salt()), reason
        request = self.of(
            encoded,
            params,
            prompt.agent or name,
            round_id,
            in_round=in_round,
            isolated=prompt.reuse == "exact",
            guarded=prompt.private == "isolated",
        )
        request.num_dropped = prompt.dropped_tokens
        request.error = error or request.error
        return request

    def of(
        self,
        encoded: EncodedPrompt,
        params: SamplingParams,
        name: str,
        round_id: RoundId,
        *,
        in_round: bool = True,
        isolated: bool = False,
        guarded: bool = False,
    ) -> Request:
        """Make a request of an encoded prompt; one that cannot be run has its `error` set."""
        error: TokenDanceError | None = None
        forced = params.forced_tokens or ()
        biased = [token for token, _ in params.logit_bias]
        for what, tokens in (("forced tokens", forced), ("tokens of logit_bias", biased)):
            if any(not 0 <= token < self._model.shape.vocab_size for token in tokens):
                error = PromptError(
                    f"The {what}{whose(name)} are not all in the model's "
                    "vocabulary. Encode them with this model's tokenizer."
                )
        max_context = self._model.shape.max_context
        if len(encoded) >= max_context:
            error = ContextError(
                f"The prompt{whose(name)} has {len(encoded)} tokens, and the "
                f"model's context holds {max_context}, the answer included. Shorten the prompt."
            )
        wanted = min(params.max_tokens, len(forced)) if forced else params.max_tokens
        request = Request(
            name,
            round_id,
            encoded,
            params,
            max_new_tokens=min(wanted, max(1, max_context - len(encoded))),
            in_round=in_round,
            isolated=isolated or params.prompt_logprobs is not None,
            guarded=guarded or self._options.private == "isolated",
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=self._model.stop_ids,
            error=error,
        )
        self._shadows.draw(request)
        return request
