"""What the Triton kernels are told of a step, read as they read it, against the plan itself."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from test_attention import in_pages, random_batch, rope_of
from tokendance.attention.interface import LayerKind, PackedBatch
from tokendance.attention.plan import make_plan
from tokendance.attention.triton_plan import DevicePlan, PlanSender

CPU = torch.device("cpu")
LAYERS = [LayerKind(rope_of(16)), LayerKind(rope_of(8), window=5), LayerKind(rope_of(16))]
Read = tuple[int, int, int, int, int]
"""Row, first slot of a range, offset, first key that is seen, key behind the last."""


def reads_of_kernel(plan: DevicePlan, offsets: list[int], rows_per_task: int) -> Counter[Read]:
    """What all programs read, by the arithmetic of `_attend_kernel`."""
    reads: Counter[Read] = Counter()
    for first, num_rows, range_begin, range_end, read, per_range in plan.tasks.tolist():
        assert 0 < num_rows <= rows_per_task
        for slot_range in range(range_begin, range_end):
            for row in range(num_rows):
                at = read + row
                reads[
                    int(plan.rows[first + row]),
                    int(plan.slot_begin[slot_range]),
                    offsets[int(plan.rotations[at])],
                    int(plan.key_begin[5][at]),
                    int(plan.key_end[at]),
                ] += 1
            read += per_range
    return reads


def reads_of_groups(batch: PackedBatch) -> Counter[Read]:
    plan = make_plan(batch, [5])
    return Counter(
        (row, slot, int(plan.offsets[rotation]), begin, end)
        for group in plan.read_groups()
        for index, slot in enumerate(group.slot_begin.tolist())
        for row, rotation, begin, end in zip(
            group.rows.tolist(),
            group.rotations[index].tolist(),
            group.key_begin[5][index].tolist(),
            group.key_end[index].tolist(),
            strict=True,
        )
    )


@settings(max_examples=examples(40))
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 5]),
    page_size=st.sampled_from([None, 4, 16]),
    rows_per_task=st.sampled_from([1, 3, 64]),
)
def test_programs_read_what_the_plan_says_once(
    seed: int, agents: int, chunk: int | None, page_size: int | None, rows_per_task: int
) -> None:
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, agents, chunk)
    if page_size is not None:
        batch = in_pages(batch, page_size, rng)
    expected, offsets = reads_of_groups(batch), make_plan(batch).offsets
    plan = PlanSender(LAYERS, CPU).send(batch, rows_per_task)
    assert reads_of_kernel(plan, offsets.tolist(), rows_per_task) == expected
    assert plan.write.tolist() == batch.write_slots().tolist()
    indptr = plan.partial_indptr.tolist()
    for row in range(batch.num_rows):  # what is merged for a row
        results = plan.partial_index[indptr[row] : indptr[row + 1]]
        assert results.tolist() == torch.nonzero(plan.rows == row).flatten().tolist()
    for rope in {layer.rope for layer in LAYERS}:
        for sent, table in zip(plan.tables[rope], rope.tables(-offsets, CPU), strict=True):
            assert torch.equal(sent, table)


def test_plans_lie_in_one_memory_from_step_to_step() -> None:
    """Aligned for wide loads, and there is nothing to allocate once it is large enough."""
    sender = PlanSender(LAYERS, CPU)
    rng = np.random.default_rng(0)
    large, small = (random_batch(rng, agents, None) for agents in (6, 1))
    memory = set()
    for batch in (large, small, large):
        plan = sender.send(batch, 8)
        arrays = [
            plan.tasks, plan.rows, plan.slot_begin, plan.rotations, plan.key_end, plan.write,
            plan.partial_indptr, plan.partial_index, *plan.key_begin.values(),
            *(table for pair in plan.tables.values() for table in pair),
        ]  # fmt: skip
        assert all(array.data_ptr() % 16 == 0 for array in arrays)
        memory |= {array.untyped_storage().data_ptr() for array in arrays}
    assert len(memory) == 1
