"""Calibration: measures what corrections achieve on a model, for policies that go by it.

For each cell of the table (order, text before the run, number of blocks) a round is computed whole,
then with each correction and by `pic`, as other engines reuse; the KL divergence over a forced
answer is noted. Of several workloads the worst counts. Cells of one private length read the same
texts: for each correction private parts are computed once, and so are the blocks, by the owner of
the largest round.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokendance.bench.arms import make_engine
from tokendance.bench.workload import Order, RoundWorkload, WorkloadSpec, write_texts
from tokendance.collector.correction import Edges
from tokendance.executor.kv_pool import KVPool
from tokendance.fidelity.measure import Reference, measure_fidelity, reference_answers
from tokendance.fidelity.table import Cell, Measured
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions, ReuseMode
from tokendance.store.entries import Entry

# From the cheapest to the dearest.
CORRECTIONS = (
    *(Edges(0, 0), Edges(1, 0), Edges(0, 1), Edges(2, 0)),
    *(Edges(first, 1) for first in (1, 2, 4, 8, 16, 32)),
)
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class CalibrationSize:
    """How much is measured."""

    private_tokens: tuple[int, ...] = (250, 1000, 2500)  # longest; the shortest: a quarter
    num_blocks: tuple[int, ...] = (4, 16, 40)  # shared blocks of each cell
    readers: int = 4  # agents of each round
    workloads: int = 2  # of each cell
    block_tokens: int = 94  # length of a block


TINY = CalibrationSize((60,), (3,), readers=3, workloads=1, block_tokens=20)
_Kind = tuple[Order, int]  # of a round: the order of its blocks, and how many there are


def measure_cells(
    model: LoadedModel,
    size: CalibrationSize,
    seed: int,
    options: EngineOptions,
    on_status: Callable[[str], None],
) -> Iterator[Cell]:
    """Measure all cells of a model's table; those that its context cannot hold are left out.

    Engines are made with `options` but for reuse, correction and memory; `on_status` is told what
    is being done, in a few words.
    """
    orders: tuple[Order, ...] = ("same", "permuted")
    for private in size.private_tokens:
        # The chat template and the task take a little too.
        room = model.shape.max_context - private - _ANSWER_TOKENS - 200
        kinds = [
            (order, blocks)
            for order in orders
            for blocks in sorted(size.num_blocks, reverse=True)
            if blocks * (size.block_tokens + 30) <= room
        ]
        if kinds:
            yield from _measure(model, size, private, kinds, seed, options, on_status)


def _measure(
    model: LoadedModel,
    size: CalibrationSize,
    private: int,
    kinds: Sequence[_Kind],
    seed: int,
    options: EngineOptions,
    on_status: Callable[[str], None],
) -> list[Cell]:
    """Measure the cells of one private length: they have texts and private parts in common."""
    most = max(blocks for _, blocks in kinds)
    num_tokens = (size.readers + most) * (private + most * (size.block_tokens + 30) + 400)
    pool = KVPool(model, num_tokens)
    worst: dict[_Kind, dict[Edges | None, float]] = {kind: {} for kind in kinds}  # None: by pic
    num_before = 0
    for number in range(size.workloads):
        what = f"{private} private tokens, workload {number + 1} of {size.workloads}"
        on_status(f"{what}: texts and full computation ...")
        # All that its prompts have in common at their beginnings is computed once.
        exact = make_engine(model, options, "prefix", num_tokens, pool=pool)
        spec = WorkloadSpec(
            max(most, size.readers), size.block_tokens, (private // 4, private), seed=seed + number
        )
        texts = write_texts(exact, spec)
        rounds = {
            (order, blocks): texts.arrange(order).head(size.readers, blocks)
            for order, blocks in kinds
        }
        references = {
            kind: reference_answers(exact, workload.prompts(), _ANSWER_TOKENS)
            for kind, workload in rounds.items()
        }
        for prompt in rounds[kinds[0]].encoded(exact):  # all before the first block is private
            num_before = max(num_before, prompt.shared_segments()[0][0])
        for edges in (*CORRECTIONS, None):
            on_status(f"{what}: {'pic' if edges is None else edges.spec} ...")
            mode: ReuseMode = "pic" if edges is None else "collective"
            llm = make_engine(model, options, mode, num_tokens, correction=edges, pool=pool)
            for kind, kl in _kl_of_rounds(llm, rounds, references):
                worst[kind][edges] = max(worst[kind].get(edges, 0.0), kl)
    cells = [
        Cell(
            order == "same",
            num_before,
            blocks,
            tuple(
                Measured(edges.first, edges.last, kl)
                for edges, kl in of_kind.items()
                if edges is not None
            ),
            of_kind[None],
        )
        for (order, blocks), of_kind in worst.items()
    ]
    return sorted(cells, key=lambda cell: (not cell.in_order, cell.num_blocks))


def _kl_of_rounds(
    llm: LLM,
    rounds: Mapping[_Kind, RoundWorkload],
    references: Mapping[_Kind, Sequence[Reference]],
) -> Iterator[tuple[_Kind, float]]:
    """KL of rounds that read what the owner of the first has computed, in which all blocks are."""
    run: set[Entry] = set()
    readers = frozenset[str]()
    for kind, workload in rounds.items():
        workload.warm(llm, keep=True, also=run)
        heard = [
            (prompt, answer)
            for prompt, answer in zip(workload.prompts(), references[kind], strict=True)
            if not readers or prompt.agent in readers
        ]
        fidelity = measure_fidelity(llm, *zip(*heard, strict=True))
        yield kind, fidelity.kl_continuation
        if not readers:
            readers = frozenset(fidelity.agents)
            for _, segment in workload.encoded(llm)[0].shared_segments():
                run.update(llm.kv_store.all_cached(segment.hash))
