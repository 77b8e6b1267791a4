"""Sampling parameters: how a request's tokens are chosen, and when it ends."""

from dataclasses import dataclass

from tokendance.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of the request's random numbers; None draws one.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own; not part of it.
        ignore_eos: go on when the model ends its answer.
        forced_tokens: answer these tokens whatever the logits say, at most `max_tokens` of them.
            For replaying recorded answers and for scoring.
        keep_logprobs: keep the log-probabilities of the whole vocabulary for every token.
        top_logprobs: keep the log-probability of every token, and of so many likeliest ones in its
            place; None keeps none.
        logit_bias: (token, bias) pairs; added to the logits.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    forced_tokens: tuple[int, ...] | None = None
    keep_logprobs: bool = False
    top_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "stop": (
                not isinstance(self.stop, str) and all(self.stop),
                "a tuple of texts that are not empty",
            ),
            "top_logprobs": (self.top_logprobs is None or self.top_logprobs >= 0, "0 or more"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "forced_tokens": (
                self.forced_tokens is None or len(self.forced_tokens) > 0,
                "not empty",
            ),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}. It must be {rule}.")
