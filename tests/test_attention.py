"""Shared-in-place attention against the plain reference, on random rounds."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.attention.backends import make_backend, native_is_there
from tokendance.attention.interface import (
    Backend,
    LayerKind,
    PackedBatch,
    PackedRequest,
    SlotRanges,
)
from tokendance.attention.merge import merge_rows
from tokendance.attention.reference import ReferenceBackend
from tokendance.attention.rope import Rope, RopeLayout
from tokendance.attention.torch_backend import TorchBackend, _attention, _matmul_attention
from tokendance.errors import ConfigError

MakeBackend = Callable[..., Backend]
BACKENDS: dict[str, MakeBackend] = {"torch": TorchBackend}
if native_is_there():
    from tokendance.attention import _native
    from tokendance.attention.native_backend import NativeBackend

    BACKENDS |= {kernel: partial(NativeBackend, kernel=kernel) for kernel in _native.kernels()}
needs_native = pytest.mark.skipif(not native_is_there(), reason="built without the native kernel")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
TRITON_DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

NUM_SLOTS = 400
# Of (page, head, slot in a page, number): all layouts of vLLM, as a layer sees them.
PAGE_ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)]
CPU = torch.device("cpu")


def random_batch(rng: np.random.Generator, num_agents: int, chunk: int | None) -> PackedBatch:
    """Agents that read subsets of shared blocks in any order, with own tokens in between.

    Each agent's context is a list of own tokens, and of blocks that somebody else owns, of which
    some tokens are corrected. A suffix of the own tokens is new.
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
        if rng.random() < 0.3:  # one of them once more
            chosen = np.append(chosen, chosen[:1])
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
        requests.append(PackedRequest(first_row, new, np.concatenate(slots)))
        first_row += len(new)
    return PackedBatch(requests, slot_position)


def in_pages(batch: PackedBatch, page_size: int, rng: np.random.Generator) -> PackedBatch:
    """The same batch in pages that lie in any order, so that few of them follow each other."""
    num_pages = -(-len(batch.slot_position) // page_size)
    pages = rng.permutation(num_pages + 3).astype(np.int32)

    def moved(slots: np.ndarray) -> np.ndarray:
        return np.asarray(pages[slots // page_size] * page_size + slots % page_size)

    slot_position = np.zeros(len(pages) * page_size, np.int32)
    slot_position[moved(np.arange(len(batch.slot_position)))] = batch.slot_position
    requests = [
        PackedRequest(request.first_row, request.positions, moved(request.slots))
        for request in batch.requests
    ]
    return PackedBatch(requests, slot_position)


class TritonInPages:
    """Triton's kernels over pages as vLLM has them; like vLLM it writes before they attend.

    Args:
        page_size: in slots.
        order: of (page, head, slot in a page, number) in memory.
    """

    def __init__(
        self,
        layers: Sequence[LayerKind],
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        page_size: int,
        order: tuple[int, int, int, int],
    ) -> None:
        from tokendance.attention.triton_backend import TritonBackend

        self._backend = TritonBackend(layers, head_dim, device, dtype)
        self._page_size, self._order = page_size, order

    def prepare(self, batch: PackedBatch) -> None:
        self._backend.prepare(batch)
        self._write = torch.from_numpy(batch.write_slots())

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (rows, _, size), kv_heads = query.shape, len(keys)
        slots = torch.cat((keys, values), dim=-1)
        slots[:, self._write.to(slots.device)] = torch.cat((key, value), dim=-1).transpose(0, 1)
        pages = slots.view(kv_heads, -1, self._page_size, 2 * size).transpose(0, 1)
        memory = pages.permute(self._order).contiguous()
        memory = memory.permute([self._order.index(axis) for axis in range(4)]).transpose(0, 1)
        # vLLM has more rows than the step, for graphs of fixed sizes.
        output = query.new_full((rows + 3, *query.shape[1:]), 7.0)
        self._backend.read(layer, query, memory[..., :size], memory[..., size:], scale, output)
        assert (output[rows:] == 7.0).all(), "rows that only fill a graph were written"
        return output[:rows]


def run(
    make: MakeBackend,
    batch: PackedBatch,
    kind: LayerKind,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
    size_of_scores: float = 1.0,
    device: torch.device = CPU,
    tokens_outermost: bool = False,
) -> torch.Tensor:
    kv_heads, group, size = shape
    generator = torch.Generator().manual_seed(seed)
    rows, slots = batch.num_rows, len(batch.slot_position)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(device, dtype)

    # Rows apart, as a model's projection leaves them.
    query = random(rows, kv_heads * group, size) * size_of_scores
    key, value = (random(rows, kv_heads, size) for _ in range(2))
    keys, values = random(kv_heads, slots, size), random(kv_heads, slots, size)
    if tokens_outermost:  # a slot's keys and values side by side, as in vLLM's pages
        memory = torch.cat((keys, values), -1).transpose(0, 1).contiguous().transpose(0, 1)
        keys, values = memory[..., :size], memory[..., size:]
    # What nobody may read is poisoned.
    readable = np.concatenate([request.slots for request in batch.requests])
    poison = np.setdiff1d(np.arange(slots), readable)
    keys[:, poison] = float("nan")
    values[:, poison] = float("nan")
    backend = make([kind], size, device, dtype)
    backend.prepare(batch)
    if make is ReferenceBackend:  # the same numbers, and a result that is not rounded to the dtype
        query, key, value = query.double(), key.double(), value.double()
        keys, values = keys.double(), values.double()
    return backend.attend(0, query, key, value, keys, values, size**-0.5).cpu()


def rope_of(rotary_dim: int, layout: RopeLayout = RopeLayout.HALVES) -> Rope:
    return Rope(10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim), layout)


def assert_close(result: torch.Tensor, expected: torch.Tensor, backend: str) -> None:
    """Compare with the reference in float64, relative to the largest number of a row.

    A shifted query is rounded to bfloat16 once more where products take pairs of them (of 5000 such
    batches one was 1.06e-2 apart), by torch and by Triton, and torch rounds its partial results.
    """
    assert expected.dtype == torch.float64
    error = (result.double() - expected.double()).abs().amax(-1)
    scale = expected.double().abs().amax(-1)
    coarse = 2e-2 if backend in ("torch", "triton", "avx512-bf16") else 1e-2
    limit = 1e-5 if result.dtype == torch.float32 else coarse
    assert (error <= limit * scale.clamp(min=0.1)).all(), float((error / scale).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 5]),
    heads=st.sampled_from([(1, 1), (3, 2), (1, 5), (2, 7)]),
    size=st.sampled_from([16, 48, 64, 80, 256]),
    rotary_dim=st.sampled_from([8, 16]),
    layout=st.sampled_from(list(RopeLayout)),
    window=st.sampled_from([None, None, 1, 3, 17]),
    tokens_outermost=st.booleans(),
)
def test_every_backend_equals_the_reference(
    backend: str,
    dtype: torch.dtype,
    seed: int,
    agents: int,
    chunk: int | None,
    heads: tuple[int, int],
    size: int,
    rotary_dim: int,
    layout: RopeLayout,
    window: int | None,
    tokens_outermost: bool,
) -> None:
    batch = random_batch(np.random.default_rng(seed), agents, chunk)
    kind = LayerKind(rope_of(rotary_dim, layout), window)
    expected = run(ReferenceBackend, batch, kind, (*heads, size), dtype, seed)
    make = partial(run, BACKENDS[backend], batch, kind, (*heads, size), dtype, seed)
    result = make(tokens_outermost=tokens_outermost)
    assert_close(result, expected, backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=examples(12))
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (2, 3)]),
    size=st.sampled_from([32, 64, 128]),
    rotary_dim=st.sampled_from([8, 32]),
    layout=st.sampled_from(list(RopeLayout)),
    window=st.sampled_from([None, 1, 17]),
    tokens_outermost=st.booleans(),
)
def test_the_triton_kernels_equal_the_reference(
    dtype: torch.dtype,
    seed: int,
    agents: int,
    heads: tuple[int, int],
    size: int,
    rotary_dim: int,
    layout: RopeLayout,
    window: int | None,
    tokens_outermost: bool,
) -> None:
    """In Triton's interpreter, where there is no GPU."""
    from tokendance.attention.triton_backend import TritonBackend

    batch = random_batch(np.random.default_rng(seed), agents, None)
    kind = LayerKind(rope_of(rotary_dim, layout), window)
    expected = run(ReferenceBackend, batch, kind, (*heads, size), dtype, seed)
    make = partial(run, TritonBackend, batch, kind, (*heads, size), dtype, seed)
    result = make(device=TRITON_DEVICE, tokens_outermost=tokens_outermost)
    assert_close(result, expected, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=examples(12))
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 4),
    chunk=st.sampled_from([None, 1, 5]),
    heads=st.sampled_from([(1, 1), (2, 3)]),
    size=st.sampled_from([32, 64, 128]),
    window=st.sampled_from([None, 17]),
    page_size=st.sampled_from([16, 32]),
    order=st.sampled_from(PAGE_ORDERS),
)
def test_the_triton_kernels_read_pages_wherever_they_lie(
    dtype: torch.dtype,
    seed: int,
    agents: int,
    chunk: int | None,
    heads: tuple[int, int],
    size: int,
    window: int | None,
    page_size: int,
    order: tuple[int, int, int, int],
) -> None:
    """In Triton's interpreter, where there is no GPU: pages of vLLM's, in each of its layouts."""
    rng = np.random.default_rng(seed)
    batch = in_pages(random_batch(rng, agents, chunk), page_size, rng)
    kind = LayerKind(rope_of(32), window)
    expected = run(ReferenceBackend, batch, kind, (*heads, size), dtype, seed)
    make = partial(TritonInPages, page_size=page_size, order=order)
    result = run(make, batch, kind, (*heads, size), dtype, seed, device=TRITON_DEVICE)
    assert_close(result, expected, "triton")


@needs_triton
@pytest.mark.parametrize(
    ("shared", "own", "new", "group"),
    [(1100, 70, 30, 3), (20, 3, 2, 71)],
    ids=["long context", "more queries of one row than a tile has"],
)
def test_the_triton_kernels_in_several_tiles(shared: int, own: int, new: int, group: int) -> None:
    from tokendance.attention.triton_backend import TritonBackend

    batch, kind, shape = long_batch(3, shared, own, new), LayerKind(rope_of(64)), (1, group, 64)
    expected = run(ReferenceBackend, batch, kind, shape, torch.float32, 0)
    result = run(TritonBackend, batch, kind, shape, torch.float32, 0, device=TRITON_DEVICE)
    assert_close(result, expected, "triton")


def long_batch(agents: int, shared: int, own: int, new: int) -> PackedBatch:
    """Agents that read one run at offsets of their own, and compute `new` tokens each."""
    slot_position = np.zeros(shared + agents * (own + new), np.int32)
    slot_position[:shared] = np.arange(shared)
    requests = []
    for agent in range(agents):
        slots = shared + agent * (own + new) + np.arange(own + new)
        prefix = min(agent % 7, own)
        context = np.concatenate([slots[:prefix], np.arange(shared), slots[prefix:]])
        positions = np.arange(len(context))
        slot_position[slots] = np.concatenate([positions[:prefix], positions[prefix + shared :]])
        requests.append(PackedRequest(agent * new, positions[-new:], context.astype(np.int32)))
    return PackedBatch(requests, slot_position)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("agents", "shared", "own", "new"),
    [
        (1, 0, 0, 1),
        (1, 0, 0, 300),
        (1, 0, 3000, 1),
        (1, 777, 50, 131),
        (200, 130, 9, 1),
        (5, 2100, 3, 40),
    ],
)
def test_long_contexts_and_many_agents(
    backend: str, agents: int, shared: int, own: int, new: int
) -> None:
    batch = long_batch(agents, shared, own, new)
    for window in (None, 100):
        kind = LayerKind(rope_of(32), window)
        for dtype in (torch.float32, torch.bfloat16):
            expected = run(ReferenceBackend, batch, kind, (2, 3, 32), dtype, 0)
            result = run(BACKENDS[backend], batch, kind, (2, 3, 32), dtype, 0)
            assert_close(result, expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_overflow_a_careless_softmax(backend: str) -> None:
    batch = long_batch(3, 200, 5, 20)
    kind = LayerKind(rope_of(16))
    for size_of_scores in (1e10, 1e2, 1e-20, 0.0):
        expected = run(ReferenceBackend, batch, kind, (1, 2, 32), torch.float32, 1, size_of_scores)
        result = run(BACKENDS[backend], batch, kind, (1, 2, 32), torch.float32, 1, size_of_scores)
        # Scores of several hundred carry float32's rounding into the exponent.
        assert (result - expected).abs().max() < 2e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none_reach_those_who_read_them_only(backend: str) -> None:
    batch = long_batch(2, 50, 5, 1)
    attention = BACKENDS[backend]([LayerKind(rope_of(16))], 32, CPU, torch.float32)
    attention.prepare(batch)
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 32), torch.randn(2, 1, 32)
    keys = torch.randn(1, len(batch.slot_position), 32)
    keys[:, batch.requests[1].slots[0]] = float("nan")
    result = attention.attend(0, query, key, key, keys, torch.randn_like(keys), 0.2)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


@needs_triton
def test_auto_takes_triton_on_a_gpu_where_it_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokendance.attention.triton_backend import TritonBackend

    layers, gpu = [LayerKind(rope_of(16))], torch.device("cuda")

    def with_capability(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    with_capability(8, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert isinstance(make_backend(layers, 128, gpu, dtype), TritonBackend)
    assert isinstance(make_backend(layers, 80, gpu, torch.bfloat16), TorchBackend)
    assert isinstance(make_backend(layers, 128, gpu, torch.bfloat16, "torch"), TorchBackend)
    with pytest.raises(ConfigError, match="no kernel for heads of 80"):
        make_backend(layers, 80, gpu, torch.bfloat16, "triton")
    with pytest.raises(ConfigError, match="it is for GPUs"):
        make_backend(layers, 128, CPU, torch.bfloat16, "triton")
    with_capability(7, 5)
    assert isinstance(make_backend(layers, 128, gpu, torch.bfloat16), TorchBackend)
    with pytest.raises(ConfigError, match=r"capability 8\.0 or higher"):
        make_backend(layers, 128, gpu, torch.bfloat16, "triton")


@needs_native
def test_auto_takes_the_native_kernel_on_a_cpu_where_it_can_serve() -> None:
    layers = [LayerKind(rope_of(16))]
    assert isinstance(make_backend(layers, 80, CPU, torch.bfloat16), NativeBackend)
    assert isinstance(make_backend(layers, 80, CPU, torch.float16), TorchBackend)
    assert isinstance(make_backend(layers, 40, CPU, torch.float32), TorchBackend)
    with pytest.raises(ConfigError, match="has none for heads of 40"):
        make_backend(layers, 40, CPU, torch.float32, "native")


@needs_native
def test_one_step_may_be_run_by_two_threads() -> None:
    batch = long_batch(12, 400, 20, 5)
    attention = NativeBackend([LayerKind(rope_of(32))], 32, CPU, torch.float32)
    attention.prepare(batch)
    slots = len(batch.slot_position)

    def attend(group: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(group)
        rows = [(batch.num_rows, 2 * group, 32), *[(batch.num_rows, 2, 32)] * 2]
        shapes = [*rows, (2, slots, 32), (2, slots, 32)]
        query, *others = (torch.randn(*shape, generator=random) for shape in shapes)
        return attention.attend(0, query, *others, 0.2)  # type: ignore[call-arg, arg-type]

    groups = (3, 7)
    expected = [attend(group) for group in groups]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            for result, alone in zip(pool.map(attend, groups), expected, strict=True):
                assert torch.equal(result, alone)


@needs_native
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    batch = long_batch(9, 1500, 40, 3)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(NativeBackend, batch, LayerKind(rope_of(32)), (3, 3, 64), dtype, 0))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@needs_native
def test_how_memory_is_divided_changes_no_bit() -> None:
    """A request alone gives the same bits whatever pages it has."""
    rng = np.random.default_rng(0)
    length, new = 2000, 37
    results = []
    order = rng.permutation(length // 16)
    for pages in (np.arange(length // 16), order):
        slots = (pages[:, None] * 16 + np.arange(16)).ravel()
        slot_position = np.zeros(length, np.int32)
        slot_position[slots] = np.arange(length)
        batch = PackedBatch(
            [PackedRequest(0, np.arange(length - new, length), slots.astype(np.int32))],
            slot_position,
        )
        torch.manual_seed(0)
        query, key = torch.randn(new, 4, 32), torch.randn(new, 2, 32)
        by_position = torch.randn(2, length, 32)
        keys = torch.empty_like(by_position)
        keys[:, slots] = by_position
        backend = NativeBackend([LayerKind(rope_of(32))], 32, CPU, torch.float32)
        backend.prepare(batch)
        results.append(backend.attend(0, query, key, key, keys, keys.clone(), 0.2))
    assert torch.equal(results[0], results[1])


@needs_native
@settings(max_examples=examples(40), deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1000, 1030),
    st.lists(st.sampled_from(["next", "next", "back", "two", "other"]), min_size=10, max_size=40),
    st.sampled_from([None, 50]),
)
def test_who_decodes_alone_has_the_same_plan_whatever_was_before(
    seed: int, length: int, steps: list[str], window: int | None
) -> None:
    """Over a span's end and a page's, after steps back, of two tokens and of another request."""
    threes = np.random.default_rng(seed).permutation(100)
    pages = (threes[:, None] * 3 + np.arange(3)).ravel()  # so many lie side by side
    slots = (pages[:, None] * 4 + np.arange(4)).ravel().astype(np.int32)
    # The other request has the same pages but for the first one.
    others: npt.NDArray[np.int32] = np.concatenate((1200 + np.arange(4, dtype=np.int32), slots[4:]))
    slots_of = {"mine": slots, "other": others}
    slot_position = np.zeros(1204, np.int32)
    for whose in ("mine", "other"):
        slot_position[slots_of[whose]] = np.arange(len(slots))
    kind = LayerKind(rope_of(32), window)
    torch.manual_seed(seed % 2**31)
    keys, values = torch.randn(2, 1, len(slot_position), 32)
    kept = NativeBackend([kind], 32, CPU, torch.float32)
    ranges = {"mine": SlotRanges(), "other": SlotRanges()}
    for step in steps:
        length += {"next": 1, "two": 2, "back": -3, "other": 1}[step]
        positions = np.arange(length - (2 if step == "two" else 1), length)
        whose = "other" if step == "other" else "mine"
        request = PackedRequest(0, positions, slots_of[whose], ranges[whose], reads_others=False)
        query, key = torch.randn(len(positions), 2, 32), torch.randn(len(positions), 1, 32)
        results = []
        for backend in (kept, NativeBackend([kind], 32, CPU, torch.float32)):
            backend.prepare(PackedBatch([request], slot_position))
            results.append(backend.attend(0, query, key, key, keys, values, 0.2))
        assert torch.equal(*results)


@needs_native
def test_the_kernel_refuses_what_would_read_or_write_elsewhere() -> None:
    ints = partial(np.array, dtype=np.int64)
    shorts = partial(np.array, dtype=np.int32)
    make: Callable[..., _native.Step] = partial(_native.Step, _native.kernels()[0], 8)
    good = [ints([0]), ints([0, 1]), ints([0, 1]), ints([0]), ints([0]), ints([4]), shorts([0])]
    for index, wrong in [
        (0, ints([9])),
        (0, ints([-1])),
        (1, ints([0, 2])),
        (2, ints([0, 2])),
        (3, ints([1])),
        (4, ints([-1])),
        (5, ints([9])),
        (6, shorts([-1])),
    ]:
        arguments = [wrong if i == index else right for i, right in enumerate(good)]
        with pytest.raises(ValueError):  # noqa: PT011 - each has a text of its own
            make(*arguments, shorts([4]))
    wild = [ints([0]), ints([0, 1, 1]), ints([0, 10**9, 1]), *good[3:]]
    with pytest.raises(ValueError, match="follow each other"):
        make(*wild, shorts([4]))
    with pytest.raises(ValueError, match="more keys"):
        make(*good, shorts([5]))
    step = make(*good, shorts([4]))
    query, new, memory = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(1, 8, 16)
    table = np.zeros((1, 8), np.float32)
    rest = (torch.zeros(1, 1, 16), None, table, table, False, 1.0, 1)
    step.attend(query, new, new, memory, memory, *rest)
    step.extend()
    step.attend(query, new, new, memory, memory, *rest)
    for _ in range(3):
        step.extend()
    with pytest.raises(ValueError, match="outside of memory"):
        step.extend()
    step = make(*good, shorts([4]))
    step.attend(query, new, new, memory, memory, rest[0], shorts([-(10**6)]), *rest[2:])
    with pytest.raises(ValueError, match="memory"):
        step.attend(query, new, new, memory[:, :7], memory[:, :7], *rest)
    with pytest.raises(ValueError, match="dtype"):
        step.attend(query.double(), new, new, memory, memory, *rest)


def test_attention_in_matrix_products_equals_the_fused_one() -> None:
    """The path of devices other than a CPU."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    mask = torch.zeros(7, 7).masked_fill_(torch.rand(7, 7) < 0.3, float("-inf"))
    mask[:, 0] = 0
    for maybe_mask in (None, mask):
        fused = _attention(query, keys, values, 0.25, maybe_mask)
        plain = _matmul_attention(query, keys, values, 0.25, maybe_mask)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


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

    def partial_result(chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        result = scores[chosen].softmax(0) @ values[chosen]
        return result.view(1, 1, 1, 8), scores[chosen].logsumexp(0).view(1, 1, 1)

    output, lse = partial_result(slice(0, 2))
    merge_rows(output, lse, *partial_result(slice(2, 4)), torch.tensor([0]))
    torch.testing.assert_close(output.view(8), expected)
    torch.testing.assert_close(lse.view(()), scores.logsumexp(0))
