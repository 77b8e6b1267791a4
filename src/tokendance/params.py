"""Sampling parameters: how a request's tokens are chosen, and when it ends."""

import math
import reprlib
from dataclasses import dataclass

from tokendance.errors import ConfigError
from tokendance.kinds import check_kinds

MAX_TOP_LOGPROBS = 1000


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Attributes:
        max_tokens: most tokens to generate; 0 computes the prompt alone.
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        min_p: only tokens at least so likely as this share of the likeliest; 0 for all.
        repetition_penalty: divides the logits, where they are positive, of tokens that the prompt
            or the answer has, and multiplies them elsewhere; 1 for none.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them as often as the answer has them.
        min_tokens: the answer does not end before it has so many, unless what it has to look like
            allows nothing else.
        seed: of the request's random numbers; None draws one.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own; not part of it.
        include_stop: the text that ended the answer is part of it, also that of such a token.
        ignore_eos: go on when the model ends its answer.
        forced_tokens: answer these tokens whatever the logits say, at most `max_tokens` of them.
            For replaying recorded answers and for scoring.
        keep_logprobs: keep the log-probabilities of the whole vocabulary for every token.
        top_logprobs: keep the log-probability of every token, and of so many likeliest ones in its
            place, at most 1000; None keeps none.
        prompt_logprobs: likewise of every token of the prompt but the first. The prompt is computed
            whole then, in passes of its own.
        logit_bias: (token, bias) pairs; added to the logits.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    forced_tokens: tuple[int, ...] | None = None
    keep_logprobs: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check_kinds(self)
        checks = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < math.inf,
                "above 0, and finite",
            ),
            "presence_penalty": (math.isfinite(self.presence_penalty), "finite"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "finite"),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_tokens,
                "0 or more, and at most max_tokens",
            ),
            "stop": (all(self.stop), "a list of texts that are not empty"),
            "top_logprobs": (
                self.top_logprobs is None or 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                f"0 to {MAX_TOP_LOGPROBS}",
            ),
            "prompt_logprobs": (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_TOP_LOGPROBS,
                f"0 to {MAX_TOP_LOGPROBS}",
            ),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "forced_tokens": (
                self.forced_tokens is None or len(self.forced_tokens) > 0,
                "not empty",
            ),
            "logit_bias": (
                all(token < 2**31 and math.isfinite(bias) for token, bias in self.logit_bias),
                "a list of pairs of a token and a finite number",
            ),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                value = reprlib.repr(getattr(self, name))
                raise ConfigError(f"{name} is {value}. It must be {rule}.")


def check_params(params: object) -> None:
    """Make sure that something is sampling parameters.

    Raises:
        ConfigError: if it is anything else.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigError(
            f"params has {reprlib.repr(params)}, a {type(params).__name__}. Give SamplingParams, "
            "such as SamplingParams(max_tokens=32)."
        )
