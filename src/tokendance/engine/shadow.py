"""Shadows: a share of mirrors, kept to be computed exactly when there is nothing else to do.

A mirror's answer is what the model says over reused KV. Its shadow is the same prompt computed
whole, with the same answer forced, so that both distributions can be compared token by token.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.engine.request import Request
from tokendance.engine.sampling import SamplingParams, compare_logprobs
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId

# Distributions over a large vocabulary are heavy (200 kB a token): so many tokens are compared,
# and so many mirrors wait.
SHADOW_TOKENS = 16
MAX_PENDING = 32


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """A mirror that is done, and waits to be computed exactly.

    Attributes:
        agent: whose it is.
        prompt: what it read.
        tokens: the beginning of its answer, with the token that ended it if it is that short.
        logprobs: float32 (vocabulary,) for each of them.
    """

    agent: str
    prompt: EncodedPrompt
    tokens: tuple[int, ...]
    logprobs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """How far one mirror was from exact computation.

    Attributes:
        agent: whose it is.
        tokens: of the answer, compared.
        kl_next: KL divergence (nats) of the first of them.
        kl: mean over all of them.
        top1: share of them at which both put the same token first.
    """

    agent: str
    tokens: int
    kl_next: float
    kl: float
    top1: float


class Shadows:
    """Chooses mirrors at random and keeps what they said.

    Attributes:
        pending: mirrors to compute exactly. When there are too many, each that was drawn has the
            same chance to be among them.
        num_dropped: those that gave way.
    """

    def __init__(self, share: float) -> None:
        """Keep a share (0 to 1) of mirrors."""
        self._share = share
        self._random = random.Random(0)
        self.pending: list[Shadow] = []
        self.num_dropped = 0

    def draw(self, request: Request) -> None:
        """Decide whether a request's distributions are kept; the engine calls it once for each."""
        may = request.in_round and not request.exact
        request.shadowed = may and self._random.random() < self._share

    def keep(self, request: Request) -> None:
        """Take over a request that is done, if it was chosen and read KV of another context."""
        placement = request.placement
        if not request.shadowed or placement is None:
            return
        if placement.num_exact >= len(request.prompt):
            return
        tokens = tuple(request.shadow_tokens)
        shadow = Shadow(
            request.agent, request.prompt, tokens, tuple(request.logprobs[: len(tokens)])
        )
        if len(self.pending) < MAX_PENDING:
            self.pending.append(shadow)
            return
        self.num_dropped += 1
        place = self._random.randrange(MAX_PENDING + self.num_dropped)
        if place < MAX_PENDING:
            self.pending[place] = shadow


def exact_request(shadow: Shadow, round_id: RoundId) -> Request:
    """Make the request that computes a shadow; its `logprobs` are for `compare`."""
    return Request(
        shadow.agent,
        round_id,
        shadow.prompt,
        SamplingParams(
            max_tokens=len(shadow.tokens), forced_tokens=shadow.tokens, keep_logprobs=True
        ),
        max_new_tokens=len(shadow.tokens),
        in_round=False,
        exact=True,
        leaves=False,
    )


def compare(shadow: Shadow, exact: tuple[Tensor, ...]) -> ShadowReport:
    """Compare a mirror's distributions with the exact ones, as many as it has."""
    kl, same = compare_logprobs(torch.stack(exact), torch.stack(shadow.logprobs))
    return ShadowReport(
        shadow.agent,
        len(shadow.tokens),
        float(kl[0]),
        float(kl.mean()),
        float(same.mean()),
    )
