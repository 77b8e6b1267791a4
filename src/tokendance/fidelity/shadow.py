"""Shadows: a share of mirrors, kept to be computed exactly when there is nothing else to do.

A mirror's answer is what the model says over reused KV. Its shadow is the same prompt computed
whole, with the same answer forced, so that both distributions can be compared token by token:

    draw             a request is made; the engine is to keep its first distributions
    after_step       it is done, and was a mirror: it waits
    next_request     its shadow is to be computed, by whoever asked for one
    finish           it has been computed: how far the mirror was;  or put_back: it was broken off
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendance.engine.events import Compared, Event
from tokendance.engine.request import Request, RequestId
from tokendance.executor.step import FloatArray
from tokendance.fidelity.compare import compare_logprobs
from tokendance.params import SamplingParams
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId

# Distributions over a large vocabulary are heavy (200 kB a token): so many tokens are compared,
# and so many mirrors wait.
SHADOW_TOKENS = 16
MAX_PENDING = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Mirror:
    """A mirror that is done."""

    agent: str  # whose it is
    request: RequestId
    round_id: RoundId  # in which it was asked
    prompt: EncodedPrompt  # what it read
    tokens: tuple[int, ...]  # the beginning of its answer, with the token that ended it, if any
    distributions: tuple[FloatArray, ...]  # of each token: log-probabilities, float32 (vocabulary,)


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """How far one mirror was from exact computation."""

    agent: str  # whose it is
    tokens: int  # of the answer, compared
    kl_next: float  # KL divergence (nats) of the first of them
    kl: float  # mean over all of them
    top1: float  # share of them at which both put the same token first


class Shadows:
    """Draws mirrors at random, keeps what they said, and compares it with their shadows.

    It hangs on the engine's loop (`after_step`, `due_s`) and computes nothing by itself.

    Attributes:
        num_dropped: mirrors that gave way to others, since too many waited. Each that was drawn
            has the same chance to stay.
    """

    def __init__(self, share: float, emit: Callable[[Event], None] = lambda _: None) -> None:
        """Keep a share (0 to 1) of mirrors, and tell of each that was compared."""
        self._share = share
        self._emit = emit
        self._random = random.Random(0)
        self._pending: list[_Mirror] = []
        self._computed: dict[Request, _Mirror] = {}  # by their shadows' requests
        self.num_dropped = 0

    @property
    def num_pending(self) -> int:
        """Mirrors that wait for their shadow to be computed."""
        return len(self._pending)

    def draw(self, request: Request) -> None:
        """Decide whether a new request's first distributions are kept, if it may be a mirror."""
        if request.in_round and not request.isolated and self._random.random() < self._share:
            request.is_shadowed = True
            request.num_distributions = max(request.num_distributions, SHADOW_TOKENS)

    def after_step(self, now: float, requests: Iterable[Request]) -> None:
        """Take over requests that are done, were drawn, and have read KV of another context."""
        del now
        for request in requests:
            if request.is_shadowed and request.finish_reason is not None:
                request.is_shadowed = False  # it may come again
                plan = request.plan
                if request.error is None and plan and plan.num_exact < len(request.prompt):
                    self._keep(request)

    def due_s(self) -> None:
        """Nothing is ever to be done here if no request comes."""

    def next_request(self, round_id: RoundId) -> Request | None:
        """Make the request that computes the next shadow; None if no mirror waits.

        Run it, then call `finish`, or `put_back` if it was broken off.
        """
        if not self._pending:
            return None
        mirror = self._pending.pop(0)
        num_tokens = len(mirror.tokens)
        request = Request(
            mirror.agent,
            round_id,
            mirror.prompt,
            SamplingParams(num_tokens, forced_tokens=mirror.tokens, keep_logprobs=True),
            max_new_tokens=num_tokens,
            in_round=False,
            isolated=True,
            publishes=False,
        )
        self._computed[request] = mirror
        return request

    def finish(self, request: Request) -> ShadowReport | None:
        """Compare a mirror with its shadow, whose request is done; None if that has failed."""
        mirror = self._computed.pop(request)
        if request.error is not None:
            return None
        kl, same = compare_logprobs(_stack(request.distributions), _stack(mirror.distributions))
        report = ShadowReport(
            mirror.agent, len(mirror.tokens), float(kl[0]), float(kl.mean()), float(same.mean())
        )
        assert request.finished_s is not None
        figures = (report.tokens, report.kl_next, report.kl, report.top1)
        self._emit(Compared(request.finished_s, mirror.request, mirror.round_id, *figures))
        return report

    def put_back(self, request: Request) -> None:
        """Let a mirror wait again whose shadow was broken off."""
        self._pending.append(self._computed.pop(request))

    def _keep(self, request: Request) -> None:
        ended = [] if request.end_token is None else [request.end_token]
        tokens = (*request.generated, *ended)[:SHADOW_TOKENS]
        distributions = tuple(request.distributions[: len(tokens)])
        mirror = _Mirror(
            request.agent, request.id, request.round_id, request.prompt, tokens, distributions
        )
        if len(self._pending) < MAX_PENDING:
            self._pending.append(mirror)
            return
        # Reservoir sampling.
        self.num_dropped += 1
        index = self._random.randrange(MAX_PENDING + self.num_dropped)
        if index < MAX_PENDING:
            self._pending[index] = mirror


def _stack(distributions: Sequence[FloatArray]) -> Tensor:
    return torch.from_numpy(np.stack(distributions))
