"""A request: one prompt on its way to its answer."""

import logging
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NewType

import numpy as np
import numpy.typing as npt
import torch

from tokendance.collector.owners import Lenders
from tokendance.collector.plan import RequestPlan
from tokendance.disk.records import SessionKey
from tokendance.engine.allocator import Allocation
from tokendance.engine.constraint import Constraint
from tokendance.engine.penalties import SeenTokens, with_bias
from tokendance.errors import ConstraintError, StepError, TokenDanceError
from tokendance.executor.step import FloatArray, SamplingRow, StepRequest, TokenLogprobs
from tokendance.outputs import Output
from tokendance.params import SamplingParams
from tokendance.rounds.segments import EncodedPrompt, Salt
from tokendance.store.entries import RoundId

log = logging.getLogger("tokendance.engine")

RequestId = NewType("RequestId", int)

# The agent of a request that says no name; messages leave it out.
ANONYMOUS = "the client"
_NOBODY = Salt(b"")
# Prompt tokens in a pass whose log-probabilities are wanted: each has a row of logits.
_NUM_SCORED = 256
_NOTHING_COPIED = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way to its answer.

    The prompt positions that the request computes itself come first, then the generated tokens:
    `num_computed` catches up with `num_to_compute`, and where they are equal the last logits are
    those of the next token.

    Attributes, given:
        agent: whose it is.
        round_id: the round that it comes with.
        prompt: what the model reads.
        params: how the answer is chosen.
        max_new_tokens: most tokens that it may generate, within the model's context.
        in_round: whether it may reuse shared segments wherever they stand, and publish its own.
        isolated: computed whole, in forward passes of its own.
        guarded: nothing that others read is computed behind text of this request that they do not
            have.
        silent: it has no answer; it computes what others of its round read, and ends with it at the
            latest.
        tenant: whose time and memory it takes; everybody with its prompt's salt if not said
            otherwise.
        publishes: whether others may reuse what it computes.
        session: that keeps what it reads, if one does.
        num_dropped: tokens that were left out of the prompt so that it fits.
        seed: of its random numbers.
        stop_ids: tokens that end it.
        constraint: what its answer has to look like.
        is_shadowed: whether it was drawn to be compared with exact computation; see
            `fidelity.shadow`, which writes it.
        num_distributions: of so many first tokens the whole distribution is kept.
        arrived_s: clock time; when it was added, if not said otherwise.
        error: what is wrong with it; whoever ends it writes, too.

    Attributes that the scheduler writes:
        owns_order: see `collector.owners.Start`.
        lenders: of its run, if it has co-owners.
        plan: what it takes, owns, corrects and computes; since it was admitted.
        allocation: where its KV lies, while it runs.
        num_computed: tokens whose KV is computed or scheduled.
        num_retries: times that it began anew because an owner failed.

    Attributes that the loop writes:
        id: when it is added.
        mask_due_s: clock time at which its constraint may be prepared though others wait for that.
        generated: the answer so far.
        end_token: that ended it, and is no part of it.
        distributions: float32 (vocabulary,), log-probabilities for each of its first tokens, the
            one that ended it included, if they are kept.
        logprobs: for each generated token, if asked for.
        prompt_logprobs: for each token of the prompt but the first, if asked for.
        finish_reason: "stop", "length" or "error" when it is done.
        stopped_by_text: whether a stop text ended it.
        text: the answer as text, when it is known.
        first_token_s: clock time of the first token.
        finished_s: likewise of the end.
    """

    agent: str
    round_id: RoundId
    prompt: EncodedPrompt
    params: SamplingParams
    max_new_tokens: int
    in_round: bool = True
    isolated: bool = False
    guarded: bool = False
    silent: bool = False
    tenant: Salt = _NOBODY
    publishes: bool = True
    session: SessionKey | None = None
    num_dropped: int = 0
    seed: int = 0
    stop_ids: Collection[int] = frozenset()
    constraint: Constraint | None = None
    is_shadowed: bool = False
    num_distributions: int = 0
    arrived_s: float | None = None
    error: TokenDanceError | None = None

    owns_order: bool = False
    lenders: Lenders | None = None
    plan: RequestPlan | None = None
    allocation: Allocation | None = None
    num_computed: int = 0
    num_retries: int = 0

    id: RequestId = RequestId(-1)
    mask_due_s: float = 0.0
    generated: list[int] = field(default_factory=list)
    end_token: int | None = None
    distributions: list[FloatArray] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stopped_by_text: bool = False
    text: str | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    _random: random.Random = field(init=False)
    _seen: SeenTokens | None = field(init=False, default=None)
    _ends: npt.NDArray[np.int64] = field(init=False)  # that may not come before `min_tokens`
    _bias: tuple[npt.NDArray[np.int64], FloatArray] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.tenant == _NOBODY:
            self.tenant = self.prompt.salt
        self._random = random.Random(self.seed)
        if self.params.logit_bias:
            tokens, biases = zip(*self.params.logit_bias, strict=True)
            self._bias = np.array(tokens, np.int64), np.array(biases, np.float32)
        self._seen = SeenTokens.of(self.params, self.prompt.token_ids)
        ends = {*self.stop_ids, *self.params.stop_token_ids} if self.params.min_tokens else ()
        self._ends = np.array(sorted(ends), np.int64)
        if self.params.keep_logprobs:
            self.num_distributions = self.max_new_tokens + 1

    @property
    def whose(self) -> str:
        """That it is its agent's, for messages; nothing if that has no name."""
        return whose(self.agent)

    def check_constraint(self) -> None:
        """Raise ConstraintError if what the answer has to look like cannot be followed."""
        assert self.constraint is not None
        if (reason := self.constraint.failure()) is not None:
            raise ConstraintError(
                f"What the answer{self.whose} shall look like cannot be followed: {reason} "
                "Simplify it."
            )

    @property
    def num_to_compute(self) -> int:
        """Prompt tokens that it computes, and tokens that it has generated."""
        assert self.allocation is not None
        return len(self.allocation.compute) + len(self.generated)

    @property
    def num_left(self) -> int:
        """Tokens that a pass would compute of it if there were no bound; while it runs."""
        return self.num_to_compute - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to compute is the last generated token."""
        return len(self.generated) > 0

    @property
    def num_reused(self) -> int:
        """Prompt tokens that it does not compute, as far as it has been admitted."""
        return self.plan.num_reused if self.plan is not None else 0

    @property
    def has_mask(self) -> bool:
        """Whether it is known what may come next; see `MaskTurns`."""
        return self.constraint is None or self.constraint.is_ready

    def next_positions(self, limit: int) -> npt.NDArray[np.int64]:
        """Positions of the next tokens to compute, at most `limit`, ascending.

        None while it is not known what may come next.
        """
        assert self.allocation is not None
        if not self.has_mask:
            limit = 0
        if self.params.prompt_logprobs is not None:
            limit = min(limit, _NUM_SCORED)
        compute = self.allocation.compute
        if self.num_computed < len(compute):
            return compute[self.num_computed : self.num_computed + limit]
        first = len(self.prompt) + self.num_computed - len(compute)
        last = len(self.prompt) + len(self.generated)
        return np.arange(first, min(last, first + limit))

    def shares(self, positions: npt.NDArray[np.int64]) -> list[StepRequest]:
        """Its shares of a step that computes some positions, the last that it scheduled.

        Tokens of its run that co-owners compute are shares of their own, before its own.
        """
        assert self.plan is not None
        assert self.allocation is not None
        if self.plan.lent is None or self.is_decoding:
            return [self._share(positions)]
        own, *of_others = self.plan.lent.divide(positions)
        shares = [
            StepRequest(
                self.prompt.token_ids[others],
                others,
                lent.slots,
                sampling=None,
                copied_from=_NOTHING_COPIED,
                begin=lent.begin,
            )
            for others, lent in zip(of_others, self.allocation.lent, strict=True)
            if len(others)
        ]
        return [*shares, self._share(own)] if len(own) else shares

    def _share(self, positions: npt.NDArray[np.int64]) -> StepRequest:
        assert self.allocation is not None
        wants_token = self.num_computed == self.num_to_compute
        copied_from = self.allocation.copied_from
        return StepRequest(
            self._tokens_at(positions),
            positions,
            self.allocation.slots,
            self._sampling_row() if wants_token else None,
            copied_from[positions] if len(copied_from) else copied_from,
            self.targets(positions),
            self.params.prompt_logprobs or 0,
        )

    def targets(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the prompt that follow some positions, if their probabilities are wanted."""
        if self.params.prompt_logprobs is None or self.is_decoding:
            return np.empty(0, np.int64)
        following = positions[positions < len(self.prompt) - 1] + 1
        return self.prompt.token_ids[following].astype(np.int64)

    def _tokens_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        if self.is_decoding:
            first, last = positions[0] - len(self.prompt), positions[-1] - len(self.prompt)
            return np.array(self.generated[first : last + 1], np.int32)
        return self.prompt.token_ids[positions]

    def _sampling_row(self) -> SamplingRow:
        """How its next token is chosen; draws a random number if one is needed."""
        params = self.params
        forced = params.forced_tokens
        forbidden = None if self.constraint is None else self.constraint.forbidden()
        bias = self._bias
        if len(self._ends) > 0 and len(self.generated) < params.min_tokens:
            if forbidden is None:
                bias = with_bias(bias, self._ends, -np.inf)
            else:
                without_end = forbidden.copy()
                without_end[self._ends] = True
                forbidden = forbidden if without_end.all() else without_end
        return SamplingRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            uniform=self._random.random() if params.temperature > 0 else 0.0,
            forced=None if forced is None else forced[len(self.generated)],
            bias=bias,
            min_p=params.min_p,
            penalties=None if self._seen is None else self._seen.penalties(self.generated),
            forbidden=forbidden,
            top_logprobs=params.top_logprobs,
            distribution=len(self.distributions) < self.num_distributions,
        )

    def restart(self) -> None:
        """Forget what was computed and said, to begin anew from the queue."""
        self.num_computed = 0
        self.generated.clear()
        self.end_token = None
        self.distributions.clear()
        self.logprobs.clear()
        self.prompt_logprobs.clear()
        if self.constraint is not None:
            self.constraint.restart()
        self.first_token_s = None
        self._random = random.Random(self.seed)
        self.num_retries += 1


def whose(agent: str) -> str:
    """That something is an agent's, for messages; nothing for one without a name."""
    return "" if agent == ANONYMOUS else f" of {agent!r}"


def make_silent(prompt: EncodedPrompt, like: Request, name: str) -> Request:
    """Make a request that computes KV of a prompt for the round of another request.

    Args:
        prompt: to compute.
        like: whose round, tenant and guard it has.
        name: for messages.
    """
    return Request(
        name,
        like.round_id,
        prompt,
        SamplingParams(max_tokens=1),
        max_new_tokens=1,
        guarded=like.guarded,
        silent=True,
        tenant=like.tenant,
    )


def make_output(request: Request) -> Output:
    """Turn a finished request into what the caller gets."""
    failed = request.error is not None
    length = 0 if failed else len(request.prompt)
    reused = 0 if failed else request.num_reused
    kept = request.distributions if request.params.keep_logprobs else []
    return Output(
        agent=request.agent,
        text=request.text or "",
        token_ids=tuple(request.generated),
        finish_reason=request.finish_reason or "error",
        error=request.error,
        prompt_token_ids=request.prompt.token_ids[:length],
        prompt_tokens=length,
        computed_tokens=length - reused,
        reused_tokens=reused,
        corrected_tokens=0 if failed or request.plan is None else request.plan.num_corrected,
        stopped_by_text=request.stopped_by_text,
        logprobs=tuple(torch.from_numpy(distribution) for distribution in kept),
        dropped_tokens=0 if failed else request.num_dropped,
        approximate_tokens=0 if failed or request.plan is None else request.plan.num_approximate,
        prompt_logprobs=() if failed else tuple(request.prompt_logprobs),
    )


def as_failure(request: Request, error: Exception) -> TokenDanceError:
    """What has gone wrong in one request's part of a step."""
    if isinstance(error, TokenDanceError):
        return error
    log.error("the request of an agent has failed", exc_info=error)
    return StepError(
        f"The request{request.whose} failed ({type(error).__name__}). The log says where."
    )
