"""The default correction: as many tokens as are worth it, by what has been measured of the model.

Each corrected token takes time, and takes away some of the error. How much depends on what is known
of a reuse before the pass: four blocks gain more than forty by as many tokens, and blocks in
another order more than those in the owner's. So of all corrections that compute no more tokens
afresh than `pic`, and are no farther from full computation than it (but for `NOISE`), that one is
taken whose error and price are least together:

    KL after it  +  PRICE * tokens that it computes afresh

With a table that says of 10 blocks of 94 tokens, (first, last) of each:

    correction    none     (2, 0)   (2, 1)   (8, 1)   (16, 1)    pic, 14 of each
    KL            0.022    0.011    0.0107   0.0064   0.006      0.018
    price                  0.002    0.003    0.009    0.017
    together    (> pic)    0.0130   0.0137   0.0154  (> 14)      (2, 0) it is

Between the numbers of blocks that were measured, logarithms of KL are interpolated over those of
the numbers; beyond them the nearest counts. Over the lengths of the text before it is the mean that
counts: so all agents of a round correct the same tokens of its blocks, whatever their private
parts, and read the run in the same pieces. A single agent may be farther away than the mean. What
was not measured gets a fixed correction, `USUAL_EDGES`: blocks that are far longer or shorter, and
isolated requests.

These are figures of single rounds. A request that goes on from what it has reused before also
computes the first `OPENING` tokens afresh of all that it reuses anew, even if that is more than
`pic` computes: reuse of reuse adds up there, most of all in the next token (`docs/log.md`).
"""

import math
from functools import cache

import numpy as np
import numpy.typing as npt

from tokendance.collector.correction import USUAL_EDGES, Edges, Mask, Reuse
from tokendance.errors import ConfigError
from tokendance.fidelity.table import FidelityTable
from tokendance.rounds.segments import Segment

# KL of a request, nats per token of its answer, for which one token more is computed afresh.
PRICE = 0.0001
# Tokens of an opening that a request corrects which goes on from what it has reused.
OPENING = 32
# KL that does not count in comparisons with `pic`: what bfloat16 costs, whatever is reused.
NOISE = 0.001
# Of the tokens that are reused, as many as `pic` computes afresh.
_MOST_SHARE = 0.15
# Below this, KL is the noise of the dtype.
_LEAST_KL = 1e-5
# By so much the blocks of a reuse may be longer or shorter than those that were measured.
_MOST_TIMES = 3
# Numbers of blocks are rounded to powers of two to this, so that there are few choices, made once.
_STEP = 0.25


class Balanced:
    """A correction policy that weighs what a correction buys against what it costs."""

    spec = "balanced"

    def __init__(self, table: FidelityTable) -> None:
        """Weigh by what a table says.

        Raises:
            ConfigError: if it lacks one of the orders, or its cells have no correction in common.
        """
        kinds = [{(one.first, one.last) for one in cell.measured} for cell in table.cells]
        self._edges = [Edges(*one) for one in sorted(set.intersection(*kinds))] if kinds else []
        orders = {cell.in_order for cell in table.cells}
        if not self._edges or len(orders) < 2:
            raise ConfigError(
                f"The fidelity table of {table.model} says too little to balance corrections by. "
                "Run `tokendance calibrate` with that model, or choose another correction."
            )
        self._curves = {order: _Curves(table, self._edges, in_order=order) for order in orders}
        self._block_tokens = table.block_tokens
        self._best = cache(self._find_best)

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask:
        """Choose by the correction whose error and price are least together."""
        return self.edges_for(reuse).choose(reuse, segment, num_read)

    def edges_for(self, reuse: Reuse) -> Edges:
        """The correction that a reuse gets."""
        edges = self._edges_by_table(reuse)
        if not reuse.goes_on or reuse.isolated:
            return edges
        return Edges(edges.first, edges.last, OPENING)

    def _edges_by_table(self, reuse: Reuse) -> Edges:
        usual = self._block_tokens * reuse.num_blocks
        if reuse.isolated or not usual <= _MOST_TIMES * reuse.num_tokens <= _MOST_TIMES**2 * usual:
            return USUAL_EDGES
        num_new = reuse.num_blocks - reuse.num_inherited
        most = int(_MOST_SHARE * reuse.num_tokens / max(1, reuse.num_blocks))
        return self._best(reuse.in_order, _step(reuse.num_blocks), _step(num_new), most)

    def _find_best(self, in_order: bool, blocks: int, new_blocks: int, most: int) -> Edges:
        """The correction of a reuse.

        Args:
            in_order: see `Reuse`.
            blocks: that are reused, in steps.
            new_blocks: those that are corrected, in steps.
            most: tokens of a block that are computed afresh.
        """
        found = self._curves[in_order].kl(_STEP * blocks)
        of_block = np.array([one.first + one.last for one in self._edges])
        kl = np.where(of_block <= max(most, of_block.min()), found[:-1], np.inf)
        pic = found[-1]
        total = kl + PRICE * 2 ** (_STEP * new_blocks) * of_block
        is_good = kl <= max(pic, kl.min()) + NOISE
        return self._edges[int(np.argmin(np.where(is_good, total, np.inf)))]


class _Curves:
    """KL by the number of blocks, in one order: after each correction, and by `pic`."""

    def __init__(self, table: FidelityTable, edges: list[Edges], *, in_order: bool) -> None:
        alike: dict[int, list[list[float]]] = {}
        for cell in sorted(table.cells, key=lambda cell: cell.num_blocks):
            if cell.in_order == in_order:
                kl = {(one.first, one.last): one.kl for one in cell.measured}
                of_cell = [*(kl[one.first, one.last] for one in edges), cell.pic]
                alike.setdefault(cell.num_blocks, []).append(of_cell)
        self._log_blocks = np.log2(list(alike))
        means = np.array([np.mean(of_cells, axis=0) for of_cells in alike.values()])
        self._log_kl = np.log(np.maximum(means, _LEAST_KL))  # (numbers of blocks, corrections + 1)

    def kl(self, log_blocks: float) -> npt.NDArray[np.float64]:
        """KL for a number of blocks, given as its logarithm to 2; (corrections + 1,), pic last."""
        log_kl = [np.interp(log_blocks, self._log_blocks, one) for one in self._log_kl.T]
        kl: npt.NDArray[np.float64] = np.exp(log_kl)
        return kl


def _step(size: int) -> int:
    return round(math.log2(max(1, size)) / _STEP)
