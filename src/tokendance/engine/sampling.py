"""Sampling parameters, and the choice of the next tokens from logits.

Each request draws one uniform number per token from a generator of its own, seeded by its seed,
so what a request says does not depend on its neighbours in the batch (up to the rounding of the
logits themselves).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place of an answer.

    Attributes:
        logprob: of the token that was chosen.
        top: (token, log-probability) of the likeliest, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def top_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `count` likeliest; logits float32 (vocabulary,)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    likeliest = logprobs.topk(count)
    top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return TokenLogprobs(float(logprobs[token]), tuple(top))


def choose_tokens(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random]
) -> list[int]:
    """Choose one token per row.

    Args:
        logits: float32 (R, vocabulary), finite.
        params: of each row's request.
        generators: of each row's request; advanced by one draw where the row is sampled.
    """
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    sampled = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    for row in sampled:
        chosen[row] = _sample(logits[row], params[row], generators[row].random())
    return chosen


def _sample(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """Choose by inverting the cumulative distribution in the order of token ids.

    That order does not depend on the logits, so a rounding error in them moves the choice only
    where `uniform` falls on an edge.
    """
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    if params.top_k and params.top_k < len(probabilities):
        likeliest = probabilities.topk(params.top_k)
        probabilities = torch.zeros_like(probabilities).scatter_(
            0, likeliest.indices, likeliest.values
        )
    if params.top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= params.top_p * probabilities.sum()
        probabilities[ids[beyond]] = 0.0
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    last = int(probabilities.nonzero()[-1])
    return min(index, last)


def compare_logprobs(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two models' distributions of the same tokens.

    Args:
        expected: float32 (tokens, vocabulary), log-probabilities.
        found: likewise.

    Returns:
        The KL divergence of `found` from `expected` in nats (tokens,), and 1 where both put the
        same token first, else 0 (tokens,).
    """
    kl = (expected.exp() * (expected - found)).sum(dim=-1)
    return kl, (expected.argmax(dim=-1) == found.argmax(dim=-1)).float()
