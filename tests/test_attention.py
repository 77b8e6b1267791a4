"""Shared-in-place attention against the plain reference, on random rounds."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance.attention.interface import PackedBatch, PackedRequest
from tokendance.attention.merge import merge_rows
from tokendance.attention.plan import make_plan
from tokendance.attention.reference import ReferenceBackend
from tokendance.attention.rope import Rope, RopeLayout
from tokendance.attention.torch_backend import TorchBackend, _attention, _written_out

NUM_SLOTS = 400
CPU = torch.device("cpu")


def random_batch(rng: np.random.Generator, num_agents: int, chunk: int | None) -> PackedBatch:
    """Agents that read subsets of shared blocks in any order, with own tokens in between.

    Each agent's context is a list of pieces; a piece is own tokens, or a block somebody else
    owns, of which some tokens are corrected. A suffix of the own tokens is new.
    """
    slot_position = np.zeros(NUM_SLOTS, np.int32)
    next_slot = 0

    def take(positions: np.ndarray) -> np.ndarray:
        nonlocal next_slot
        slots = np.arange(next_slot, next_slot + len(positions), dtype=np.int32)
        assert next_slot + len(positions) <= NUM_SLOTS
        slot_position[slots] = positions
        next_slot += len(positions) + int(rng.integers(0, 3))
        return slots

    # A run in the store as its owner left it: common tokens, then corrected ones.
    lengths = rng.integers(1, 20, int(rng.integers(0, 5)))
    start, num_corrected = int(rng.integers(0, 30)), int(rng.integers(0, 4))
    block_of = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.concatenate([np.arange(length) for length in (*lengths, 0)])
    order = np.argsort(inside < num_corrected, kind="stable")
    slot_of = np.empty(len(order), np.int32)
    slot_of[order] = take(start + order)
    blocks = [slot_of[block_of == index] for index in range(len(lengths))]

    requests = []
    first_row = 0
    for _ in range(num_agents):
        slots: list[np.ndarray] = []
        own: list[np.ndarray] = []
        length = 0

        def add_own(
            count: int, slots: list[np.ndarray] = slots, own: list[np.ndarray] = own
        ) -> None:
            nonlocal length
            positions = np.arange(length, length + count)
            slots.append(take(positions))
            own.append(positions)
            length += count

        if rng.random() < 0.8:
            add_own(int(rng.integers(1, 12)))
        chosen = np.arange(len(blocks))
        if rng.random() < 0.4:
            chosen = rng.permutation(len(blocks))[: int(rng.integers(0, len(blocks) + 1))]
        for index in chosen:
            block = blocks[index]
            corrected = min(num_corrected, len(block))
            if corrected:
                add_own(corrected)
            slots.append(block[corrected:])
            length += len(block) - corrected
        add_own(int(rng.integers(1, 8)))
        positions = np.concatenate(own)
        num_new = len(positions) if rng.random() < 0.5 else int(rng.integers(1, len(positions) + 1))
        new = positions[-num_new:]
        if chunk is not None and len(positions) > chunk:
            new = positions[-chunk:]
        scattered = bool(rng.random() < 0.3)
        requests.append(PackedRequest(first_row, new, np.concatenate(slots), scattered))
        first_row += len(new)
    return PackedBatch(requests, slot_position)


def run(
    backend_class: type,
    batch: PackedBatch,
    rope: Rope,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
) -> torch.Tensor:
    kv_heads, group, size = shape
    generator = torch.Generator().manual_seed(seed)
    rows = batch.num_rows

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(dtype)

    query = random(kv_heads, group, rows, size)
    key, value = random(kv_heads, rows, size), random(kv_heads, rows, size)
    keys, values = random(kv_heads, NUM_SLOTS, size), random(kv_heads, NUM_SLOTS, size)
    # What nobody may read is poisoned.
    readable = np.concatenate([request.slots for request in batch.requests])
    poison = np.setdiff1d(np.arange(NUM_SLOTS), readable)
    keys[:, poison] = float("nan")
    values[:, poison] = float("nan")
    backend = backend_class(rope, CPU, dtype)
    backend.prepare(batch)
    result: torch.Tensor = backend.attend(query, key, value, keys, values, size**-0.5)
    return result


@pytest.mark.parametrize("layout", RopeLayout)
@pytest.mark.parametrize("min_tier_rows", [1, 32])
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 5]),
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 2, 4]),
    rotated=st.sampled_from([8, 16]),
)
def test_torch_backend_equals_reference(
    layout: RopeLayout,
    min_tier_rows: int,
    seed: int,
    agents: int,
    chunk: int | None,
    kv_heads: int,
    group: int,
    rotated: int,
) -> None:
    batch = random_batch(np.random.default_rng(seed), agents, chunk)
    rope = Rope(10000.0 ** (-torch.arange(0, rotated, 2) / rotated), layout)
    shape = (kv_heads, group, 16)
    expected = run(ReferenceBackend, batch, rope, shape, torch.float32, seed)
    with patch("tokendance.attention.plan._MIN_TIER_ROWS", min_tier_rows):
        result = run(TorchBackend, batch, rope, shape, torch.float32, seed)
    # float32 with other orders of summation over at most a hundred keys.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)


def test_rows_that_see_too_many_different_keys_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokendance.attention.plan.MAX_TIERS", 1)
    rope = Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16))
    num_masked = 0
    for seed in range(60):
        batch = random_batch(np.random.default_rng(seed), 2, None)
        tiers = [tier for part in make_plan(batch).shared for tier in part.tiers]
        num_masked += sum(tier.visible is not None for tier in tiers)
        expected = run(ReferenceBackend, batch, rope, (2, 2, 16), torch.float32, seed)
        result = run(TorchBackend, batch, rope, (2, 2, 16), torch.float32, seed)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)
    assert num_masked > 20


def test_the_written_out_attention_equals_the_fused_one() -> None:
    """The path of devices other than a CPU."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    mask = torch.zeros(7, 7).masked_fill_(torch.rand(7, 7) < 0.3, float("-inf"))
    mask[:, 0] = 0
    for options in ({}, {"causal": True}, {"mask": mask}):
        fused = _attention(query, keys, values, 0.25, **options)
        plain = _written_out(query, keys, values, 0.25, **options)
        for one, other in zip(fused, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_torch_backend_in_bfloat16() -> None:
    rope = Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16))
    for seed in range(20):
        batch = random_batch(np.random.default_rng(seed), 4, None)
        expected = run(ReferenceBackend, batch, rope, (2, 2, 16), torch.bfloat16, seed)
        result = run(TorchBackend, batch, rope, (2, 2, 16), torch.bfloat16, seed)
        # bfloat16 keeps 8 bits; a shifted query is rounded once more than in the reference.
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("layout", RopeLayout)
def test_rotations_add_up(layout: RopeLayout) -> None:
    rope = Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16), layout)
    heads = torch.randn(3, 5, 24)
    once = rope.rotate(heads, rope.tables(np.full(5, 700), CPU))
    twice = rope.rotate(
        rope.rotate(heads, rope.tables(np.full(5, 1000), CPU)), rope.tables(np.full(5, -300), CPU)
    )
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)
    assert torch.equal(once[..., 16:], heads[..., 16:])


def test_merge_survives_large_scores() -> None:
    scores = torch.tensor([300.0, -300.0, 250.0, 301.0])
    values = torch.randn(4, 8)
    expected = scores.softmax(0) @ values

    def part(chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        result = scores[chosen].softmax(0) @ values[chosen]
        return result.view(1, 1, 1, 8), scores[chosen].logsumexp(0).view(1, 1, 1)

    output, lse = part(slice(0, 2))
    merge_rows(output, lse, *part(slice(2, 4)), slice(0, 1))
    torch.testing.assert_close(output.view(8), expected)
    torch.testing.assert_close(lse.view(()), scores.logsumexp(0))
