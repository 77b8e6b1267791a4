"""A request: one prompt on its way to its answer."""

import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.collector.placement import Placement
from tokendance.disk.records import SessionKey
from tokendance.engine.constraint import Constraint
from tokendance.engine.sampling import SamplingParams, TokenLogprobs
from tokendance.errors import TokenDanceError
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way to its answer.

    The prompt positions that the request computes itself come first, then the generated tokens:
    `num_computed` catches up with `num_to_compute`, and where they are equal the last logits are
    those of the next token.

    Attributes:
        agent: whose it is.
        round_id: the round that it came with.
        prompt: what the model reads.
        params: how the answer is chosen.
        max_new_tokens: most tokens that it may generate, within the model's context.
        in_round: whether it may reuse shared segments wherever they stand, and leave its own.
        exact: computed whole, in forward passes of its own.
        leaves: whether others may reuse what it computes.
        session: that keeps what it reads, if one does.
        shadowed: whether its first distributions are kept; `engine.shadow` writes it.
        owns_order: see `collector.owners.Start`; the engine writes it.
        seed: of its random numbers.
        generator: of its random numbers; the sampler draws one a token.
        bias: tokens, int64 (n,), and what is added to their logits, float32 (n,), if anything is.
        stop_ids: tokens that end it.
        constraint: what its answer has to look like.
        placement: where its KV lies; the scheduler writes it on admission.
        num_computed: tokens whose KV is computed or scheduled; the scheduler writes it.
        generated: the answer so far; the engine writes it.
        shadow_tokens: the first tokens, one that ended the answer included, if it is shadowed; the
            engine writes it.
        logprobs: float32 (vocabulary,) per generated token, if asked for, or the first
            ones if it is shadowed; the engine writes it.
        top_logprobs: one per generated token, if asked for; the engine writes it.
        finish_reason: "stop", "length" or "error" when it is done; the engine writes it.
        stopped_by_text: whether a stop text ended it; the engine writes it.
        error: what went wrong, with reason "error".
        text: the answer as text, when it is known; the engine writes it.
        num_cached: prompt tokens that were not computed; the scheduler writes it on admission.
        num_corrected: shared tokens computed afresh; the scheduler writes it on admission.
        reads_copies: whether it reuses segments from another context; the scheduler writes it on
            admission.
        num_retries: times that it began anew because an owner failed.
        first_token_s: clock time of the first token, likewise `finished_s`; the engine writes.
    """

    agent: str
    round_id: RoundId
    prompt: EncodedPrompt
    params: SamplingParams
    max_new_tokens: int
    in_round: bool = True
    exact: bool = False
    leaves: bool = True
    session: SessionKey | None = None
    shadowed: bool = False
    owns_order: bool = False
    seed: int = 0
    generator: random.Random = field(init=False)
    bias: tuple[Tensor, Tensor] | None = None
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    placement: Placement | None = None
    num_computed: int = 0
    generated: list[int] = field(default_factory=list)
    shadow_tokens: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stopped_by_text: bool = False
    error: TokenDanceError | None = None
    text: str | None = None
    num_cached: int = 0
    num_corrected: int = 0
    reads_copies: bool = False
    num_retries: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)
        if self.params.logit_bias:
            tokens, biases = zip(*self.params.logit_bias, strict=True)
            self.bias = torch.tensor(tokens), torch.tensor(biases, dtype=torch.float32)

    @property
    def num_to_compute(self) -> int:
        """Prompt tokens that it computes, and tokens that it has generated."""
        assert self.placement is not None
        return len(self.placement.compute) + len(self.generated)

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to compute is the last generated token."""
        return len(self.generated) > 0

    def next_positions(self, limit: int) -> npt.NDArray[np.int64]:
        """Positions of the next tokens to compute, at most `limit`, ascending."""
        assert self.placement is not None
        compute = self.placement.compute
        if self.num_computed < len(compute):
            return compute[self.num_computed : self.num_computed + limit]
        first = len(self.prompt) + self.num_computed - len(compute)
        last = len(self.prompt) + len(self.generated)
        return np.arange(first, min(last, first + limit))

    def tokens_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Token ids at some positions of prompt and answer."""
        if self.is_decoding:
            first, last = positions[0] - len(self.prompt), positions[-1] - len(self.prompt)
            return np.array(self.generated[first : last + 1], np.int32)
        return self.prompt.token_ids[positions]

    def restart(self) -> None:
        """Forget what was computed and said, to begin anew from the queue."""
        self.num_computed = 0
        self.generated.clear()
        self.shadow_tokens.clear()
        self.logprobs.clear()
        self.top_logprobs.clear()
        if self.constraint is not None:
            self.constraint.restart()
        self.first_token_s = None
        self.generator = random.Random(self.seed)
        self.num_retries += 1
