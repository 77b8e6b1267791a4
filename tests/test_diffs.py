"""Diffs against caches that were not made by us: nothing is lost that should not be."""

import threading
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance.attention.rope import Rope
from tokendance.errors import CacheError, ConfigError
from tokendance.store.dense import DenseCache, LayerKV
from tokendance.store.floats import BFLOAT16, KVArray, bits_of, narrow, widen
from tokendance.store.foreign.alignment import Match, Turns, cut_blocks, from_master
from tokendance.store.foreign.diffs import CacheDiff, encode_diff
from tokendance.store.foreign.masters import choose_master
from tokendance.store.foreign.restore import restore_into, restore_layers

DTYPE_LIST: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
DTYPES = pytest.mark.parametrize("dtype", DTYPE_LIST, ids=["float32", "float16", "bfloat16"])


@dataclass(frozen=True)
class Case:
    """Two caches and what they have in common."""

    sibling: DenseCache
    master: DenseCache
    matches: Sequence[Match]
    inv_freq: Sequence[np.ndarray]
    block_tokens: int

    def encode(self, threshold: float = 0.0) -> CacheDiff:
        return encode_diff(
            self.sibling,
            self.master,
            self.matches,
            self.inv_freq,
            threshold=threshold,
            block_tokens=self.block_tokens,
        )


def any_bits(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> KVArray:
    """Numbers of every kind: infinite, NaN, subnormal, both zeros."""
    size = 2 ** (8 * dtype.itemsize)
    unsigned = np.uint32 if dtype.itemsize == 4 else np.uint16
    bits = random.integers(0, size, shape, unsigned)
    bits[random.random(shape) < 0.1] = 0
    return bits.view(dtype)


def normal(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> KVArray:
    return narrow(random.standard_normal(shape).astype(np.float32), dtype)


@st.composite
def cases(draw: st.DrawFn, wild: bool) -> Case:
    """Siblings that are partly the master's rotated KV; `wild` ones have bits of any kind."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPE_LIST))
    fill = any_bits if wild else normal
    num_tokens, master_tokens = draw(st.integers(0, 90)), draw(st.integers(1, 90))
    matches: list[Match] = []
    start = 0
    while start < num_tokens and draw(st.booleans()):
        start += draw(st.integers(0, min(9, num_tokens - start - 1)))
        length = draw(st.integers(1, min(num_tokens - start, master_tokens)))
        matches.append(Match(start, draw(st.integers(0, master_tokens - length)), length))
        start += length
    shapes = [
        (draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    inv_freq = [
        random.random(draw(st.integers(0, size // 2))).astype(np.float32) for _, size in shapes
    ]
    master = [
        LayerKV(*(fill(random, (master_tokens, *shape), dtype) for _ in range(2)))
        for shape in shapes
    ]
    block_tokens = draw(st.integers(1, 40))
    cut = cut_blocks(num_tokens, matches, block_tokens)
    common = np.flatnonzero(cut.sources >= 0)
    sibling = []
    for layer, frequencies in zip(master, inv_freq, strict=True):
        own = [fill(random, (num_tokens, *layer.keys.shape[1:]), dtype) for _ in range(2)]
        turns = Turns.of(matches, frequencies)
        own[0][common] = from_master(layer.keys, cut, common, turns)
        own[1][common] = from_master(layer.values, cut, common, None)
        for array in own:  # some tokens differ, a little or wholly
            changed = random.random(num_tokens) < draw(st.sampled_from([0, 0.05, 1]))
            if wild:
                array[changed] = fill(random, array.shape, dtype)[changed]
            else:
                noise = random.standard_normal(array.shape) * 10.0 ** draw(st.integers(-4, 1))
                noisy = narrow((widen(array) + noise).astype(np.float32), dtype)
                array[changed] = noisy[changed]
        sibling.append(LayerKV(*own))
    return Case(sibling, master, draw(st.permutations(matches)), inv_freq, block_tokens)


def copy_of(cache: Iterable[LayerKV]) -> list[LayerKV]:
    return [LayerKV(layer.keys.copy(), layer.values.copy()) for layer in cache]


def assert_same_bits(one: Sequence[LayerKV], other: Sequence[LayerKV]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys.dtype == right.keys.dtype
        assert np.array_equal(bits_of(left.keys), bits_of(right.keys))
        assert np.array_equal(bits_of(left.values), bits_of(right.values))


def restore_in_turn(diff: CacheDiff, master: DenseCache) -> list[LayerKV]:
    """Through the two buffers; each layer is copied before the next is asked for."""
    return copy_of(restore_layers(diff, master))


def restore_directly(diff: CacheDiff, master: DenseCache) -> list[LayerKV]:
    """Each layer through `restore_into`, in memory like the engine's, slots in disorder."""
    random = np.random.default_rng(0)
    restored = []
    for index, layer in enumerate(master):
        _, heads, size = layer.keys.shape
        slots = random.permutation(diff.num_tokens + 5)[: diff.num_tokens]
        memory = np.full((2, heads, diff.num_tokens + 5, size), 1, layer.keys.dtype)
        keys, values = memory.transpose(0, 2, 1, 3)
        restore_into(diff, index, layer, keys, values, slots)
        others = np.setdiff1d(np.arange(diff.num_tokens + 5), slots)
        assert (memory[:, :, others] == 1).all(), "other slots were written"
        restored.append(LayerKV(keys[slots], values[slots]))
    return restored


@settings(max_examples=150, deadline=None)
@given(cases(wild=True))
def test_without_a_threshold_nothing_is_lost(case: Case) -> None:
    sibling, master = copy_of(case.sibling), copy_of(case.master)
    diff = case.encode()
    assert_same_bits(restore_in_turn(diff, case.master), case.sibling)
    assert_same_bits(restore_directly(diff, case.master), case.sibling)
    assert_same_bits(case.sibling, sibling)
    assert_same_bits(case.master, master)


@settings(max_examples=150, deadline=None)
@given(cases(wild=False), st.sampled_from([0.0, 1e-4, 1e-2, 0.5, 10.0]))
def test_every_element_is_within_the_threshold(case: Case, threshold: float) -> None:
    diff = case.encode(threshold)
    restored = restore_in_turn(diff, case.master)
    assert_same_bits(restore_directly(diff, case.master), restored)
    cut = cut_blocks(diff.num_tokens, diff.matches, diff.block_tokens)
    edges = [*cut.block_starts.tolist(), diff.num_tokens]
    for own, back, layer in zip(case.sibling, restored, diff.layers, strict=True):
        for true, near, tensor in (
            (own.keys, back.keys, layer.keys),
            (own.values, back.values, layer.values),
        ):
            for block, is_stored in enumerate(tensor.stored):
                tokens = slice(edges[block], edges[block + 1])
                exact = widen(true[tokens]).astype(np.float64)
                error = np.abs(exact - widen(near[tokens])).max()
                rms = np.sqrt(np.square(exact).mean())
                if is_stored:
                    assert np.array_equal(true[tokens], near[tokens])
                else:
                    assert error <= threshold * rms * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(cases(wild=False))
def test_sizes_are_those_of_what_is_stored(case: Case) -> None:
    tight, loose = case.encode(), case.encode(0.5)
    dense = sum(layer.num_bytes for layer in case.sibling)
    assert tight.dense_bytes == loose.dense_bytes == dense
    assert loose.num_bytes <= tight.num_bytes
    cut = cut_blocks(tight.num_tokens, tight.matches, case.block_tokens)
    lengths = np.diff(cut.block_starts, append=tight.num_tokens)
    num_bytes = 12 * len(case.matches)
    num_bytes += sum(
        {f.tobytes(): 2 * f.nbytes * len(case.matches) for f in case.inv_freq}.values()
    )
    for layer, diff in zip(case.sibling, tight.layers, strict=True):
        token_bytes = layer.keys.itemsize * layer.keys.shape[1] * layer.keys.shape[2]
        for tensor in (diff.keys, diff.values):
            num_bytes += len(lengths) + int(lengths[tensor.stored].sum()) * token_bytes
    assert tight.num_bytes == num_bytes


def example(dtype: np.dtype[Any] = DTYPE_LIST[0], num_layers: int = 3, tokens: int = 64) -> Case:
    """A sibling that is the master's KV, four tokens further on."""
    random = np.random.default_rng(1)
    inv_freq = [np.array([1.0, 0.1, 0.01, 0.001], np.float32)] * num_layers
    master = [
        LayerKV(*(normal(random, (tokens, 2, 8), dtype) for _ in range(2)))
        for _ in range(num_layers)
    ]
    matches = [Match(4, 0, tokens)]
    cut = cut_blocks(tokens + 4, matches, 16)
    common = np.arange(4, tokens + 4)
    sibling = []
    for layer in master:
        keys, values = (normal(random, (tokens + 4, 2, 8), dtype) for _ in range(2))
        keys[common] = from_master(layer.keys, cut, common, Turns.of(matches, inv_freq[0]))
        values[common] = layer.values
        sibling.append(LayerKV(keys, values))
    return Case(sibling, master, matches, inv_freq, 16)


@DTYPES
def test_equal_text_takes_next_to_nothing(dtype: np.dtype[Any]) -> None:
    case = example(dtype)
    diff = case.encode()
    assert diff.deviation == 0
    assert [layer.keys.stored.tolist() for layer in diff.layers] == [[True] + [False] * 4] * 3
    private = 3 * 2 * 4 * 2 * 8 * dtype.itemsize
    tables = 2 * 4 * 4
    assert diff.num_bytes == private + 3 * 2 * 5 + tables + 12


def test_one_bit_is_a_difference() -> None:
    case = example()
    keys = case.sibling[1].keys
    keys[40, 1, 3] = np.nextafter(keys[40, 1, 3], np.float32(9))
    changed = case.encode()
    assert changed.layers[1].keys.stored.tolist() == [True, False, False, True, False]
    assert not changed.layers[1].values.stored[1:].any()
    assert not case.encode(1e-5).layers[1].keys.stored[1:].any()


def test_what_is_not_finite_is_never_near() -> None:
    case = example()
    for number in (np.nan, np.inf, -np.inf):
        case.sibling[0].values[10, 0, 0] = number
        assert case.encode(1e6).layers[0].values.stored[1]
        assert case.encode(1e6).deviation == np.inf
        case.master[0].values[6, 0, 0] = number  # equal in every bit, so nothing to store
        assert not case.encode(1e6).layers[0].values.stored[1]


@pytest.mark.parametrize("half", [0, 1, 3, 4])
def test_keys_are_rotated_as_attention_does(half: int) -> None:
    random = np.random.default_rng(2)
    rows = normal(random, (20, 2, 8), DTYPE_LIST[0])
    frequencies = random.random(half).astype(np.float32)
    matches = [Match(3, 10, 5), Match(30, 0, 10)]
    cut = cut_blocks(50, matches, 32)
    common = np.flatnonzero(cut.sources >= 0)
    found = from_master(rows, cut, common, Turns.of(matches, frequencies))
    rope = Rope(torch.from_numpy(frequencies))
    offsets = common - cut.sources[common]
    heads = torch.from_numpy(rows[cut.sources[common]]).transpose(0, 1)
    expected = rope.rotate(heads, rope.tables(offsets, heads.device)).transpose(0, 1).numpy()
    # Sums of two products; a fused product would differ in the last digit.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_deviation_is_the_mean_over_tensors() -> None:
    case = example(num_layers=2)
    case.sibling[0].values[4:] *= 1.25  # by a fifth of what the sibling has
    assert case.encode().deviation == pytest.approx(0.2 / 4)
    assert encode_diff(case.sibling, case.master, [], case.inv_freq).deviation is None


def test_layers_go_through_two_buffers() -> None:
    case = example(num_layers=6)
    diff = case.encode()
    seen = []
    for index, layer in enumerate(restore_layers(diff, case.master)):
        before = (layer.keys.copy(), layer.values.copy())
        time.sleep(0.02)  # the thread has long prepared the next layer
        assert np.array_equal(before[0], layer.keys)
        assert np.array_equal(before[1], layer.values)
        assert_same_bits([layer], [case.sibling[index]])
        with pytest.raises(ValueError, match="read-only"):
            layer.keys[:] = 0
        seen.append(layer)
    for index in range(2, 6):
        assert np.shares_memory(seen[index].keys, seen[index - 2].keys)
        assert not np.shares_memory(seen[index].keys, seen[index - 1].keys)


def test_memory_is_that_of_few_layers() -> None:
    case = example(num_layers=40, tokens=1024)
    diff = case.encode()
    layer_bytes = case.sibling[0].num_bytes
    tracemalloc.start()
    try:
        for _ in restore_layers(diff, case.master):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * layer_bytes, "two buffers, and less than that to work in"


def test_a_caller_that_stops_early_leaves_no_thread() -> None:
    case = example()
    layers = restore_layers(case.encode(), case.master)
    next(layers)
    assert any(thread.name.startswith("restore") for thread in threading.enumerate())
    layers.close()
    assert not any(thread.name.startswith("restore") for thread in threading.enumerate())


def test_choosing_a_master_by_either_measure() -> None:
    """The mean of the others is nearest to them, and has no block in common with any."""
    random = np.random.default_rng(3)
    keys, base = normal(random, (2, 64, 1, 8), DTYPE_LIST[0])
    first, second = base.copy(), base.copy()
    first[:32] += normal(random, (32, 1, 8), DTYPE_LIST[0])
    second[32:] += normal(random, (32, 1, 8), DTYPE_LIST[0])
    mean = (base + first + second) / np.float32(3)
    caches = [[LayerKV(keys, values)] for values in (first, mean, second, base)]
    inv_freq = [np.ones(4, np.float32)]
    choice = choose_master(
        caches, lambda _sibling, _master: [Match(0, 0, 64)], inv_freq, block_tokens=16
    )
    for index, score in enumerate(choice.scores):
        diffs = [
            encode_diff(other, caches[index], [Match(0, 0, 64)], inv_freq, block_tokens=16)
            for place, other in enumerate(caches)
            if place != index
        ]
        assert score.num_bytes == caches[0][0].num_bytes + sum(diff.num_bytes for diff in diffs)
        assert score.deviation == pytest.approx(np.mean([diff.deviation for diff in diffs]))
    assert (choice.least_deviation, choice.least_bytes) == (1, 3)
    alone = choose_master(caches[:1], lambda _sibling, _master: [], inv_freq)
    assert (alone.least_deviation, alone.least_bytes) == (0, 0)
    assert alone.scores[0].num_bytes == caches[0][0].num_bytes
    with pytest.raises(CacheError, match="at least one"):
        choose_master([], lambda _sibling, _master: [], inv_freq)


def test_bfloat16_is_rounded_to_even() -> None:
    random = np.random.default_rng(4)
    bits = random.integers(0, 2**32, 20000, np.uint32)
    bits[:5000] = (bits[:5000] & 0xFFFF0000) | 0x8000  # the middle between two
    numbers = bits.view(np.float32)
    expected = torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()
    found = narrow(numbers, BFLOAT16)
    nan = np.isnan(numbers)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.isnan(widen(found[nan])).all()
    halves = np.arange(2**16, dtype=np.uint16)
    kept = narrow(widen(halves), BFLOAT16) == halves
    assert (kept | np.isnan(widen(halves))).all()


def layer_of(*shape: int, dtype: Any = np.float32) -> LayerKV:
    return LayerKV(np.zeros(shape, dtype), np.zeros(shape, dtype))


def test_arrays_that_are_no_cache() -> None:
    with pytest.raises(CacheError, match="kv_heads, head_dim"):
        layer_of(4, 8)
    with pytest.raises(CacheError, match="at least one head"):
        layer_of(4, 0, 8)
    with pytest.raises(CacheError, match="bfloat16 as uint16"):
        layer_of(4, 1, 8, dtype=np.float64)
    with pytest.raises(CacheError, match="one shape"):
        LayerKV(np.zeros((4, 1, 8), np.float32), np.zeros((5, 1, 8), np.float32))
    with pytest.raises(CacheError, match="one dtype"):
        LayerKV(np.zeros((4, 1, 8), np.float32), np.zeros((4, 1, 8), np.float16))


FREQUENCIES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("sibling", "master", "inv_freq", "message"),
    [
        ([], [], [], "sibling has no layers"),
        ([layer_of(4, 1, 8)], [], [FREQUENCIES], "master has no layers"),
        ([layer_of(4, 1, 8), layer_of(5, 1, 8)], [layer_of(4, 1, 8)] * 2, [FREQUENCIES] * 2,
         "Layer 1 of the sibling"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8)] * 2, [FREQUENCIES], "1 layers and the master 2"),
        ([layer_of(4, 1, 8)], [layer_of(4, 2, 8)], [FREQUENCIES], "same model"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8, dtype=np.float16)], [FREQUENCIES], "one dtype"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8)], [], "frequencies for 0 layers"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8)], [np.ones(5, np.float32)], "half of head_dim"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8)], [np.ones(4)], "float32"),
        ([layer_of(4, 1, 8)], [layer_of(4, 1, 8)], [FREQUENCIES * np.float32(np.nan)], "finite"),
    ],
)  # fmt: skip
def test_caches_that_do_not_fit(
    sibling: DenseCache, master: DenseCache, inv_freq: Sequence[np.ndarray], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        encode_diff(sibling, master, [], inv_freq)


@pytest.mark.parametrize(
    "matches",
    [
        [Match(0, 0, 0)],
        [Match(-1, 0, 2)],
        [Match(0, -1, 2)],
        [Match(9, 0, 2)],
        [Match(0, 5, 2)],
        [Match(0, 0, 3), Match(2, 0, 3)],
        [Match(5, 0, 1), Match(2, 0, 4)],
    ],
)
def test_matches_that_do_not_fit(matches: list[Match]) -> None:
    with pytest.raises(CacheError, match="sibling"):
        encode_diff([layer_of(10, 1, 8)], [layer_of(6, 1, 8)], matches, [FREQUENCIES])


@pytest.mark.parametrize("threshold", [-0.1, np.nan, np.inf])
def test_thresholds_that_cannot_be(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        example().encode(threshold)


def test_block_size_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="block_tokens"):
        encode_diff([layer_of(2, 1, 8)], [layer_of(2, 1, 8)], [], [FREQUENCIES], block_tokens=0)


def test_masters_that_do_not_fit_a_diff() -> None:
    diff = example().encode()
    master = example().master
    with pytest.raises(CacheError, match="3 layers and the master 2"):
        restore_layers(diff, master[:2])
    with pytest.raises(CacheError, match="encoded against"):
        restore_layers(diff, [layer_of(64, 2, 6)] * 3)
    with pytest.raises(CacheError, match="does not fit"):
        restore_layers(diff, [layer_of(63, 2, 8)] * 3)
    with pytest.raises(CacheError, match="layers 0 to 2"):
        restore_into(diff, 3, master[0], np.zeros((68, 2, 8)), np.zeros((68, 2, 8)), np.arange(68))


def test_memory_that_does_not_fit_is_not_written() -> None:
    case = example()
    diff, layer = case.encode(), case.master[0]
    memory = np.zeros((2, 80, 2, 8), np.float32)
    slots = np.arange(68)
    for wrong in (slots[:-1], slots + 13, slots - 1, np.minimum(slots, 66), slots[None]):
        with pytest.raises(CacheError, match="slot of its own"):
            restore_into(diff, 0, layer, memory[0], memory[1], wrong)
    for other in (
        memory.astype(np.float16),
        memory[..., :6],
        np.broadcast_to(memory, memory.shape),
    ):
        with pytest.raises(CacheError, match="writable array"):
            restore_into(diff, 0, layer, other[0], other[1], slots)
    assert not memory.any()
