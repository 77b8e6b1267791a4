"""An executor without a model: what it says follows from the tokens that a request reads.

Its memory holds the token itself in place of keys and values, so a request that reads a slot that
nobody has written, or the wrong one, is found out. Scheduler, loop and server are tested with it.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokendance.executor.step import (
    FloatArray,
    SamplingRow,
    SlotArray,
    StepInput,
    StepOutput,
    TokenLogprobs,
)
from tokendance.store.kv_rows import KVRows

_EMPTY = -1
# A distribution that is all but certain.
_LIKELY, _UNLIKELY = -0.01, -12.0


def next_token(token_ids: Sequence[int], vocab_size: int, first: int = 0) -> int:
    """What the executor says after some tokens.

    Args:
        token_ids: all that is read.
        vocab_size: tokens there are.
        first: the smallest that is said, so that special ones are not.
    """
    digest = zlib.crc32(np.array(token_ids, np.int32).tobytes())
    return first + digest % (vocab_size - first)


class FakeExecutor:
    """Runs steps in no time; see the module.

    Attributes:
        steps: all that were run, in order.
        fail: raised by the next step, once, in place of running it.
    """

    def __init__(self, num_slots: int, vocab_size: int, first: int = 0) -> None:
        """Make memory for `num_slots` tokens; see `next_token` for the others."""
        self._tokens = np.full(num_slots, _EMPTY, np.int32)
        self._positions = np.zeros(num_slots, np.int32)
        self._vocab_size = vocab_size
        self._first = first
        self.steps: list[StepInput] = []
        self.fail: BaseException | None = None

    def execute(self, step: StepInput) -> StepOutput:
        """Write the tokens, and say what follows; see `Executor`."""
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        self.steps.append(step)
        for request in step.requests:
            slots = request.slots[request.positions]
            self._tokens[slots] = request.token_ids
            self._positions[slots] = request.positions
        chosen: list[int] = []
        for request in step.requests:
            context = self._tokens[request.slots[request.begin : int(request.positions[-1]) + 1]]
            assert (context != _EMPTY).all(), "a request reads a slot that nobody has written"
            if request.sampling is not None:
                chosen.append(self._choose(context, request.sampling))
        rows = step.sampling
        logprobs = [
            None if row.top_logprobs is None else TokenLogprobs(_LIKELY, ((token, _LIKELY),))
            for row, token in zip(rows, chosen, strict=True)
        ]
        distributions = [
            self._distribution(token) if row.distribution else None
            for row, token in zip(rows, chosen, strict=True)
        ]
        return StepOutput(chosen, [True] * len(chosen), logprobs, distributions)

    def _choose(self, context: SlotArray, row: SamplingRow) -> int:
        if row.forced is not None:
            return row.forced
        token = next_token(context.tolist(), self._vocab_size, self._first)
        if row.forbidden is not None and row.forbidden[token]:
            return int(np.argmin(row.forbidden))
        return token

    def _distribution(self, token: int) -> FloatArray:
        distribution = np.full(self._vocab_size, _UNLIKELY, np.float32)
        distribution[token] = _LIKELY
        return distribution

    def read_kv(self, slots: SlotArray) -> KVRows:
        """The tokens, as keys of one layer and head; see `Executor`."""
        keys = self._tokens[slots].astype(np.float32)[None, None, :, None]
        return KVRows(self._positions[slots], keys, keys)

    def positions_of(self, slots: SlotArray) -> npt.NDArray[np.int32]:
        """See `Executor`."""
        return self._positions[slots]

    def write_kv(self, slots: SlotArray, rows: KVRows) -> None:
        """See `Executor`."""
        self._tokens[slots] = rows.keys[0, 0, :, 0].astype(np.int32)
        self._positions[slots] = rows.positions
