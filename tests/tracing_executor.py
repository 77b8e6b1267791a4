"""A `FakeExecutor` that knows of each slot whose text its KV was computed behind.

Secrets are token ids that stand in the text of some agents only. Of what a request reads, every
secret must stand in its own text, and before it: else somebody has learned of it.
"""

from collections.abc import Collection, Sequence

import numpy as np

from fake_executor import FakeExecutor
from tokendance.executor.step import SlotArray, StepInput, StepOutput, StepRequest
from tokendance.store.kv_rows import KVRows

Secrets = frozenset[int]


class TracingExecutor(FakeExecutor):
    """Runs steps as a `FakeExecutor`; the values of its KV are numbers of sets of secrets.

    Attributes:
        learned: secrets that a request has read without having them, one set for each row.
        num_rows: rows whose reading was looked at.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        first: int,
        *,
        secrets: Collection[int],
        known_sets: list[Secrets] | None = None,
    ) -> None:
        """Trace some tokens; executors that exchange KV have their `known_sets` in common."""
        super().__init__(num_slots, vocab_size, first)
        self._secrets = frozenset(secrets)
        self._sets: list[Secrets] = [frozenset()] if known_sets is None else known_sets
        self._behind = np.zeros(num_slots, np.int32)  # by slot, the number of its set
        self.learned: list[Secrets] = []
        self.num_rows = 0

    def execute(self, step: StepInput) -> StepOutput:
        """See `FakeExecutor`."""
        output = super().execute(step)
        for request in step.requests:
            self._behind[request.slots[request.positions]] = self._number_of(frozenset())
        # Co-owners of a run read each other's tokens of the same step.
        before: list[int] | None = None
        while before != (after := self._behind.tolist()):
            before = after
            learned = [found for request in step.requests for found in self._read(request)]
        self.learned += learned
        return output

    def _read(self, request: StepRequest) -> list[Secrets]:
        """Note behind what a request's tokens are computed; what it learns, a set for each row."""
        learned = []
        new = set(request.positions.tolist())
        length = int(request.positions[-1]) + 1
        slots = request.slots[request.begin : length].tolist()
        own: Secrets = frozenset()
        behind: Secrets = frozenset()
        for position, (slot, token) in enumerate(
            zip(slots, self._tokens[slots].tolist(), strict=True), request.begin
        ):
            own |= self._secrets & {token}
            if position in new:
                behind |= self._secrets & {token}
                self._behind[slot] = self._number_of(behind)
            else:
                behind |= self._sets[self._behind[slot]]
            if not behind <= own:
                learned.append(behind - own)
        self.num_rows += length
        return learned

    def _number_of(self, secrets: Secrets) -> int:
        if secrets not in self._sets:
            self._sets.append(secrets)
        return self._sets.index(secrets)

    def read_kv(self, slots: SlotArray) -> KVRows:
        """See `FakeExecutor`."""
        rows = super().read_kv(slots)
        values = self._behind[slots].astype(np.float32)[None, None, :, None]
        return KVRows(rows.positions, rows.keys, values)

    def write_kv(self, slots: SlotArray, rows: KVRows) -> None:
        """See `FakeExecutor`."""
        super().write_kv(slots, rows)
        self._behind[slots] = rows.values[0, 0, :, 0].astype(np.int32)


def letters(text: str) -> Sequence[int]:
    """Token ids of printable ASCII characters in the tokenizer of the tests."""
    return [3 + ord(character) - ord("!") for character in text]
