"""Calibration: measures what corrections achieve on a model, for `--fidelity-target`.

Cell by cell of the table (order, text before the run, number of blocks), a round is computed whole,
and then with each correction; the KL divergence over a forced answer is noted. Of several workloads
the worst counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from tokendance.bench.fidelity import measure_fidelity, reference_answers
from tokendance.bench.suite import LiveTable
from tokendance.bench.workload import Order, WorkloadSpec, generate_workload
from tokendance.collector.correction import Edges
from tokendance.collector.target import Cell, FidelityTable, Measured
from tokendance.config import EngineConfig, StoreConfig
from tokendance.engine.runner import KVMemory
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, dtype_name

# (first, last) tokens of each block, from the cheapest to the dearest.
_CORRECTIONS = ((0, 0), (0, 1), (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1))
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class CalibrationSize:
    """How much is measured.

    Attributes:
        private_tokens: longest private part of each cell; the shortest is a quarter of it.
        num_blocks: shared blocks of each cell.
        readers: agents of each round.
        workloads: of each cell.
        block_tokens: length of a block.
    """

    private_tokens: tuple[int, ...] = (250, 1000, 2500)
    num_blocks: tuple[int, ...] = (4, 16, 40)
    readers: int = 4
    workloads: int = 2
    block_tokens: int = 94


TINY = CalibrationSize((60,), (3,), readers=3, workloads=1, block_tokens=20)


def calibrate(
    model: LoadedModel, size: CalibrationSize, seed: int, console: Console
) -> FidelityTable:
    """Measure all cells, printing each; cells that the model's context cannot hold are left out."""
    columns = {"in_order": "in order", "num_before": "before", "num_blocks": "blocks"}
    columns |= {f"{first}+{last}": f"{first}+{last}" for first, last in _CORRECTIONS}
    table = LiveTable(console, "KL after correcting the first + last tokens of each block", columns)
    cells = []
    for order, private, blocks in _grid(model, size):
        with console.status(f"{order}, {private} tokens before {blocks} blocks ..."):
            cell = _measure_cell(model, size, order, private, blocks, seed)
        cells.append(cell)
        kl = {f"{one.first}+{one.last}": one.kl for one in cell.measured}
        table.add(
            {
                "in_order": "yes" if cell.in_order else "no",
                "num_before": cell.num_before,
                "num_blocks": cell.num_blocks,
                **kl,
            }
        )
    return FidelityTable(model.name, dtype_name(model.dtype), tuple(cells))


def _grid(model: LoadedModel, size: CalibrationSize) -> Iterator[tuple[Order, int, int]]:
    orders: tuple[Order, ...] = ("same", "permuted")
    for order in orders:
        for private in size.private_tokens:
            for blocks in size.num_blocks:
                # The chat template and the task take a little too.
                length = private + blocks * (size.block_tokens + 30) + _ANSWER_TOKENS + 200
                if length <= model.shape.max_context:
                    yield order, private, blocks


def _measure_cell(
    model: LoadedModel, size: CalibrationSize, order: Order, private: int, blocks: int, seed: int
) -> Cell:
    num_tokens = (size.readers + blocks) * (private + blocks * (size.block_tokens + 30) + 400)
    store = StoreConfig(num_tokens * model.shape.kv_bytes_per_token(model.dtype))
    memory = KVMemory.allocate(model, num_tokens)
    exact = LLM.from_loaded(model, EngineConfig("none", store=store), memory)
    worst: dict[tuple[int, int], float] = {}
    num_before = 0
    for number in range(size.workloads):
        spec = WorkloadSpec(
            max(blocks, size.readers),
            size.block_tokens,
            (private // 4, private),
            order=order,
            seed=seed + number,
        )
        workload = generate_workload(exact, spec).head(size.readers, blocks)
        prompts = workload.prompts()
        reference = reference_answers(exact, prompts, _ANSWER_TOKENS)
        starts = [exact.encoder.encode(prompt).shared_segments()[0][0] for prompt in prompts]
        num_before = max(num_before, *starts)  # all of it private
        for first, last in _CORRECTIONS:
            config = EngineConfig("collective", Edges(first, last), store=store)
            llm = LLM.from_loaded(model, config, memory)
            found = measure_fidelity(llm, prompts, reference)
            worst[first, last] = max(worst.get((first, last), 0.0), found.kl_continuation)
    return Cell(
        order == "same",
        num_before,
        blocks,
        tuple(Measured(first, last, kl) for (first, last), kl in worst.items()),
    )
