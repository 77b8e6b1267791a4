"""The choice of the next tokens from logits, for all requests of a step at once.

What a request says does not depend on its neighbours in the batch, up to the rounding of the
logits themselves: its random number comes with it (`SamplingRow.uniform`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tokendance.executor.step import FloatArray, SamplingRow, StepInput, StepOutput, TokenLogprobs

# What is likelier than so much of the likeliest token most often reaches `top_p`; all do.
_LEAST_WEIGHTS = (2.0**-7, 2.0**-14, 0.0)
# Lower ones are as good as this: near it, only tokens as likely as the likeliest are drawn.
_LEAST_TEMPERATURE = 1e-5
# Weights that are summed at once, to find where a random number falls.
_BLOCK = 256


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> StepOutput:
    """Choose a token for each of R rows, and say what was asked of its probabilities.

    The logits, float32 (R, vocabulary), are changed in place.
    """
    with torch.inference_mode():
        # A sum is finite only where all numbers are: one pass over these megabytes is enough.
        is_finite = logits.sum(dim=-1).isfinite()
        if not bool(is_finite.all()):
            logits[~is_finite] = 0.0
        _restrict(logits, rows)
        chosen = _choose(logits, rows)
        logprobs, distributions = _describe(logits, rows, chosen)
    return StepOutput(chosen, is_finite.tolist(), logprobs, distributions)


def score(logits: Tensor, step: StepInput) -> list[TokenLogprobs]:
    """Log-probabilities of a step's n targets; logits before each, float32 (n, vocabulary)."""
    targets = np.concatenate([request.targets for request in step.requests])
    counts = [request.num_top for request in step.requests for _ in request.targets]
    with torch.inference_mode():
        logprobs = torch.log_softmax(logits, dim=-1)
        rows = torch.as_tensor(targets, device=logits.device)[:, None]
        of_targets = logprobs.gather(1, rows)
        ranks = (1 + (logprobs > of_targets).sum(dim=-1)).tolist()
        likeliest = logprobs.topk(min(max(counts), logits.shape[-1]))
        found = zip(
            of_targets[:, 0].tolist(),
            ranks,
            likeliest.indices.tolist(),
            likeliest.values.tolist(),
            counts,
            strict=True,
        )
        return [
            TokenLogprobs(logprob, tuple(zip(tokens[:count], values[:count], strict=True)), rank)
            for logprob, rank, tokens, values, count in found
        ]


def _restrict(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Take penalties, add biases and rule out what is forbidden, in place."""
    device = logits.device
    _penalize(logits, rows)
    biased = [(row, one.bias) for row, one in enumerate(rows) if one.bias is not None]
    if biased:
        tokens = torch.cat([torch.from_numpy(bias[0]) for _, bias in biased])
        values = torch.cat([torch.from_numpy(bias[1]) for _, bias in biased])
        row_of = torch.tensor([row for row, bias in biased for _ in bias[0]])
        where = (row_of.to(device), tokens.to(device))
        logits.index_put_(where, values.to(device), accumulate=True)
    masked = [(row, one.forbidden) for row, one in enumerate(rows) if one.forbidden is not None]
    for row, forbidden in masked:  # a view each: putting them side by side would copy the logits
        logits[row].masked_fill_(torch.from_numpy(forbidden).to(device), -torch.inf)


def _penalize(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Take penalties from the logits of tokens that were there before, in place.

    It takes time for each such token, and none for rows without penalties.
    """
    penalized = [(row, one.penalties) for row, one in enumerate(rows) if one.penalties is not None]
    if not penalized:
        return
    device, width = logits.device, logits.shape[-1]
    places = np.concatenate([row * width + one.tokens for row, one in penalized])  # in all logits
    where = torch.from_numpy(places).to(device)
    lengths = [len(one.tokens) for _, one in penalized]

    def of_each(values: Sequence[float]) -> Tensor:
        """A value of each row, repeated for its tokens."""
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(device)

    values = logits.take(where)
    if any(one.repetition != 1 for _, one in penalized):
        repetition = of_each([one.repetition for _, one in penalized])
        values = torch.where(values > 0, values / repetition, values * repetition)
    if any(one.frequency != 0 or one.presence != 0 for _, one in penalized):
        counts = torch.from_numpy(np.concatenate([one.counts for _, one in penalized])).to(device)
        values -= of_each([one.frequency for _, one in penalized]) * counts
        values -= of_each([one.presence for _, one in penalized]) * (counts > 0)
    logits.put_(where, values)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [row for row, one in enumerate(rows) if one.temperature > 0 and one.forced is None]
    if drawn:
        asked = [rows[row] for row in drawn]
        scores = logits if len(drawn) == len(rows) else logits[drawn]
        # Dividing takes as long as all the rest.
        inverse = [[1 / max(one.temperature, _LEAST_TEMPERATURE)] for one in asked]
        # A row that allows no token has no weights; what it asked for fails when it is told one.
        highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        weights = (scores - highest).mul_(torch.tensor(inverse, device=scores.device)).exp_()
        least = [row for row, one in enumerate(asked) if one.min_p > 0]
        _drop_below(weights, least, weights.new_tensor([asked[row].min_p for row in least]))
        keep_top_k(weights, [one.top_k for one in asked])
        keep_top_p(weights, [one.top_p for one in asked])
        tokens = _draw(weights, [one.uniform for one in asked])
        for row, token in zip(drawn, tokens, strict=True):
            chosen[row] = token
    for row, one in enumerate(rows):
        if one.forced is not None:
            chosen[row] = one.forced
    return chosen


def _describe(
    logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]
) -> tuple[list[TokenLogprobs | None], list[FloatArray | None]]:
    """Log-probabilities, where they are wanted."""
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    distributions: list[FloatArray | None] = [None] * len(rows)
    wanting = [
        row for row, one in enumerate(rows) if one.distribution or one.top_logprobs is not None
    ]
    if not wanting:
        return logprobs, distributions
    all_logprobs = torch.log_softmax(logits[wanting], dim=-1)
    counts = [rows[row].top_logprobs or 0 for row in wanting]
    likeliest = all_logprobs.topk(min(max(counts), logits.shape[-1]))
    values, tokens = likeliest.values.tolist(), likeliest.indices.tolist()
    picked = torch.tensor([[chosen[row]] for row in wanting], device=logits.device)
    of_chosen = all_logprobs.gather(1, picked)[:, 0].tolist()
    for index, row in enumerate(wanting):
        if rows[row].top_logprobs is not None:
            top = zip(tokens[index][: counts[index]], values[index], strict=False)
            logprobs[row] = TokenLogprobs(of_chosen[index], tuple(top))
        if rows[row].distribution:  # a copy, so that it does not keep its neighbours in memory
            distributions[row] = all_logprobs[index].cpu().numpy().copy()
    return logprobs, distributions


def keep_top_k(weights: Tensor, top_k: Sequence[int]) -> None:
    """Set all weights to 0 but those of the k likeliest tokens, in place.

    What is as likely as the last that is allowed is allowed, too.

    Args:
        weights: float32 (R, vocabulary), not negative.
        top_k: of each row; 0 for all.
    """
    limited = [row for row, k in enumerate(top_k) if 0 < k < weights.shape[-1]]
    if not limited:
        return
    ks = torch.tensor([[top_k[row]] for row in limited], device=weights.device)
    likeliest = weights[limited].topk(int(ks.max())).values
    _drop_below(weights, limited, likeliest.gather(1, ks - 1)[:, 0])


def keep_top_p(weights: Tensor, top_p: Sequence[float]) -> None:
    """Set all weights to 0 but those of the likeliest tokens that reach a probability, in place.

    What is as likely as the last that is allowed is allowed, too. Most often few tokens have most
    of the weight, and finding these is much quicker than sorting all.

    Args:
        weights: float32 (R, vocabulary), not negative, at most 1, which the likeliest has.
        top_p: of each row.
    """
    left = [row for row, p in enumerate(top_p) if p < 1]
    for least in _LEAST_WEIGHTS:
        if not left:
            return
        some = weights if len(left) == len(weights) else weights[left]
        shares = torch.tensor(
            [top_p[row] for row in left], dtype=torch.float64, device=weights.device
        )
        wanted = shares * some.sum(dim=-1, dtype=torch.float64)
        likely = some > least
        counts = likely.sum(dim=-1)
        # The likely ones of each row, side by side.
        candidates = some.new_zeros(len(left), max(1, int(counts.max())))
        row, token = likely.nonzero(as_tuple=True)
        first = counts.cumsum(dim=-1) - counts
        number = torch.arange(len(row), device=row.device) - first[row]
        candidates[row, number] = some[row, token]
        candidates = candidates.sort(dim=-1, descending=True).values
        sums = candidates.cumsum(dim=-1, dtype=torch.float64)
        last = (sums < wanted[:, None]).sum(dim=-1).minimum((counts - 1).clamp(min=0))
        reached = (sums[:, -1] >= wanted) | (least == 0.0)
        done = [index for index, is_reached in enumerate(reached.tolist()) if is_reached]
        threshold = candidates.gather(1, last[:, None])[:, 0]
        _drop_below(weights, [left[index] for index in done], threshold[done])
        left = [row for index, row in enumerate(left) if index not in set(done)]


def _drop_below(weights: Tensor, rows: Sequence[int], least: Tensor) -> None:
    """Set the weights of some rows that are below `least`, float32 (rows,), to 0, in place."""
    if not rows:
        return
    thresholds = weights.new_zeros(len(weights))
    thresholds[list(rows)] = least
    weights.masked_fill_(weights < thresholds[:, None], 0.0)


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
    block = _index_of(ends, sums, targets)
    row = torch.arange(len(weights), device=weights.device)
    inside = blocks[row, block].double()
    begins = ends[row, block] - sums[row, block]
    token = _index_of(inside.cumsum(dim=-1), inside, (targets - begins).clamp(min=0.0))
    tokens: list[int] = (block * _BLOCK + token).tolist()
    return tokens


def _index_of(ends: Tensor, parts: Tensor, targets: Tensor) -> Tensor:
    """In which part each target falls: the last that is not empty, if rounding puts it beyond.

    Args:
        ends: (R, n), sums of `parts` so far.
        parts: (R, n).
        targets: (R,).
    """
    index = torch.searchsorted(ends, targets[:, None], right=True)[:, 0]
    number = torch.arange(parts.shape[-1], device=parts.device)
    return index.minimum(torch.where(parts > 0, number, 0).amax(dim=-1))
