"""What goes into an executor and what comes out: one step, in integers and arrays.

A step is frozen and can be pickled, so it may be recorded, sent to another process, or made up by
a test. Nothing of a request is in it but what the pass needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokendance.outputs import TokenLogprobs as TokenLogprobs
from tokendance.store.kv_rows import KVRows

IntArray = npt.NDArray[np.int64]
SlotArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """What is taken from the logits of tokens that were there before; see `SamplingParams`.

    Attributes:
        tokens: int64 (n,), of the prompt and the answer, each once.
        counts: float32 (n,), how often the answer has each.
        repetition: divides or multiplies the logits of all of them.
        presence: taken from those that the answer has.
        frequency: likewise, as often as it has them.
    """

    tokens: IntArray
    counts: FloatArray
    repetition: float
    presence: float
    frequency: float


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRow:
    """How one request's next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        min_p: only tokens at least so likely as this share of the likeliest; 0 for all.
        penalties: if there are any.
        uniform: the random number that decides, from 0 up to 1; drawn by whoever makes the step,
            so that what a request says depends on its own seed alone.
        forced: this token is chosen, whatever the logits say.
        bias: tokens, int64 (n,), and what is added to their logits, float32 (n,).
        forbidden: bool (vocabulary,), tokens that may not come.
        top_logprobs: the log-probability of the token and of so many likeliest ones is wanted.
        distribution: whether the log-probabilities of the whole vocabulary are wanted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0
    forced: int | None = None
    bias: tuple[IntArray, FloatArray] | None = None
    min_p: float = 0.0
    penalties: Penalties | None = None
    forbidden: npt.NDArray[np.bool_] | None = None
    top_logprobs: int | None = None
    distribution: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StepRequest:
    """A share of a step: tokens of one request that read one context.

    Attributes:
        token_ids: int32 (t,), to compute.
        positions: int64 (t,), of these tokens, ascending.
        slots: int32, where the KV of each position up to the last of these lies, or more.
        sampling: how the token after the last is chosen; None if it is not wanted.
        targets: int64 (n,), n at most t: the tokens that follow the first n of these, where their
            log-probabilities are wanted; empty elsewhere.
        num_top: the log-probabilities of so many likeliest tokens are wanted in their places.
        copied_from: int32 (t,), slots whose KV takes the place of what is computed, or negative;
            empty where nothing is copied. Only executors that copy look at it (`bench.pic`).
        begin: its context begins at this position; what `slots` has before it means nothing.
    """

    token_ids: npt.NDArray[np.int32]
    positions: IntArray
    slots: SlotArray
    sampling: SamplingRow | None
    copied_from: SlotArray
    targets: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    num_top: int = 0
    begin: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """One forward pass: its requests' tokens lie in this order, owners before their mirrors."""

    requests: tuple[StepRequest, ...]

    @property
    def num_tokens(self) -> int:
        """To compute."""
        return sum(len(request.positions) for request in self.requests)

    @property
    def sampling(self) -> list[SamplingRow]:
        """Of each request that wants a token, in order."""
        return [request.sampling for request in self.requests if request.sampling is not None]


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What a step has chosen, for each request that wanted a token, in order."""

    token_ids: Sequence[int]  # of each
    is_finite: Sequence[bool]  # whether its logits were; else its token means nothing
    logprobs: Sequence[TokenLogprobs | None]  # where they were wanted
    distributions: Sequence[FloatArray | None]  # log-probabilities, float32 (vocabulary,)
    targets: Sequence[TokenLogprobs] = ()  # of all requests' targets, in a row


class RowMemory(Protocol):
    """Memory whose slots can be copied out and in."""

    def read_kv(self, slots: SlotArray) -> KVRows:
        """Copy the KV of some slots, int32 (n,), out of memory, with its keys' positions."""
        ...

    def positions_of(self, slots: SlotArray) -> npt.NDArray[np.int32]:
        """Positions of the keys in some slots, int32 (n,)."""
        ...

    def write_kv(self, slots: SlotArray, rows: KVRows) -> None:
        """Copy KV into slots, int32 (n,).

        Raises:
            StoreError: if it is of another shape or dtype than this memory.
        """
        ...


class Executor(RowMemory, Protocol):
    """Runs steps over KV memory of its own. Used by one thread."""

    def execute(self, step: StepInput) -> StepOutput:
        """Run one forward pass, and choose the next tokens.

        KV of all tokens of the step is in its slots afterwards; a token sees KV of the same pass,
        whosever it is. An exception may leave KV of these slots half written.
        """
        ...
