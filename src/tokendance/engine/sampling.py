"""Sampling parameters, and the choice of the next tokens from logits.

Each request draws one uniform number per token from a generator of its own, seeded by its seed,
so what a request says does not depend on its neighbours in the batch (up to the rounding of the
logits themselves).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendance.errors import ConfigError

# What is likelier than so much of the likeliest token most often reaches `top_p`; all do.
_LEAST_WEIGHTS = (2.0**-7, 2.0**-14, 0.0)
# Lower ones are as good as this: near it, only tokens as likely as the likeliest are drawn.
_LEAST_TEMPERATURE = 1e-5
# Tokens more than a stop text can have, for characters that are cut and tokens without text.
_MARGIN = 8
# Weights that are summed at once, to find where a random number falls.
_BLOCK = 256


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
    if not sampled:
        return chosen
    rows = logits if len(sampled) == len(params) else logits[sampled]
    # Dividing takes as long as all the rest.
    inverse = [[1 / max(params[row].temperature, _LEAST_TEMPERATURE)] for row in sampled]
    sharpness = torch.tensor(inverse, device=rows.device)
    # A row that allows no token has no weights; what it asked for fails when it is told one.
    highest = rows.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).min)
    weights = (rows - highest).mul_(sharpness).exp_()
    for row, row_weights in zip(sampled, weights, strict=True):
        _keep_likeliest(row_weights, params[row])
    uniforms = [generators[row].random() for row in sampled]
    for row, token in zip(sampled, _draw(weights, uniforms), strict=True):
        chosen[row] = token
    return chosen


def _keep_likeliest(weights: Tensor, params: SamplingParams) -> None:
    """Set all weights to 0 but those that `top_k` and `top_p` allow, in place.

    What is as likely as the last that is allowed is allowed, too. Most often few tokens have most
    of the weight, and finding these is much quicker than sorting all.

    Args:
        weights: float32 (vocabulary,), not negative, at most 1, which the likeliest has.
        params: of the request.
    """
    if 0 < params.top_k < len(weights):
        weights.masked_fill_(weights < weights.topk(params.top_k).values[-1], 0.0)
    wanted = params.top_p * weights.sum(dtype=torch.float64) if params.top_p < 1 else 0.0
    if wanted > 0:
        for least in _LEAST_WEIGHTS:
            likeliest = weights[weights > least].sort(descending=True).values
            sums = likeliest.cumsum(dim=-1, dtype=torch.float64)
            if sums[-1] >= wanted:
                break
        last = min(int((sums < wanted).sum()), len(likeliest) - 1)
        weights.masked_fill_(weights < likeliest[last], 0.0)


def _draw(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Choose by inverting the cumulative distribution in the order of token ids.

    That order does not depend on the weights, so a rounding error in them moves the choice only
    where the random number falls on an edge. Sums of blocks say in which block it falls, so that
    only this one is summed token by token.

    Args:
        weights: float32 (R, vocabulary), not negative.
        uniforms: a number from 0 up to 1 for each row.

    Returns:
        A token with a weight above 0 for each row; 0 where there is none.
    """
    rest = -weights.shape[-1] % _BLOCK
    padded = nn.functional.pad(weights, (0, rest)) if rest else weights
    blocks = padded.view(len(weights), -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    ends = sums.cumsum(dim=-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device) * ends[:, -1]
    block = _place(ends, sums, targets)
    row = torch.arange(len(weights), device=weights.device)
    inside = blocks[row, block].double()
    begins = ends[row, block] - sums[row, block]
    token = _place(inside.cumsum(dim=-1), inside, (targets - begins).clamp(min=0.0))
    found: list[int] = (block * _BLOCK + token).tolist()
    return found


def _place(ends: Tensor, parts: Tensor, targets: Tensor) -> Tensor:
    """In which part each target falls: the last that is not empty, if rounding puts it beyond.

    Args:
        ends: (R, n), sums of `parts` so far.
        parts: (R, n).
        targets: (R,).
    """
    place = torch.searchsorted(ends, targets[:, None], right=True)[:, 0]
    number = torch.arange(parts.shape[-1], device=parts.device)
    return place.minimum(torch.where(parts > 0, number, 0).amax(dim=-1))


def text_up_to_stop(
    generated: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str | None:
    """The text of an answer before the stop text that its last token has ended, if it has.

    Args:
        generated: the answer so far; what it was before had no stop text in it.
        stops: texts that end it.
        decode: token ids to text.
    """
    # A token has a byte or more, special ones aside, so the last few hold it. Where the first of
    # them begins inside a character, some decoders read none of the bytes that follow.
    longest = max(len(stop.encode(errors="surrogatepass")) for stop in stops) + _MARGIN
    end = decode(generated[-longest:])
    if "\ufffd" not in end and not any(stop in end for stop in stops):
        return None
    text = decode(generated)
    found = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(found)] if found else None
