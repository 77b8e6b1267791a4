"""The attention backends of GPUs on the device itself, against the plain reference on the CPU.

`make gpu` runs this on a GPU; elsewhere tests/test_attention.py tests the same backends. Triton
compiles a kernel for each kind of heads, in seconds, so there are few of these, of real models, and
many rounds for each.
"""

import os
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_attention import (
    PAGE_ORDERS,
    MakeBackend,
    TritonInPages,
    assert_close,
    in_pages,
    long_batch,
    random_batch,
    rope_of,
    run,
)
from tokendance.attention.interface import LayerKind
from tokendance.attention.reference import ReferenceBackend
from tokendance.attention.rope import RopeLayout
from tokendance.attention.torch_backend import TorchBackend

DEVICE = torch.device(os.environ.get("TOKENDANCE_TEST_DEVICE", "cuda"))
IS_GPU = DEVICE.type == "cuda"
EXAMPLES = 40 if IS_GPU else 2

if IS_GPU and not torch.cuda.is_available():
    pytest.skip("there is no GPU (make gpu)", allow_module_level=True)


@dataclass(frozen=True, slots=True)
class Heads:
    """What a kernel is compiled for."""

    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    rotary_dim: int | None = None
    layout: RopeLayout = RopeLayout.HALVES
    window: int | None = None

    @property
    def kind(self) -> LayerKind:
        return LayerKind(rope_of(self.rotary_dim or self.head_dim, self.layout), self.window)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.group, self.head_dim


HEADS = {
    "qwen2.5-7b": Heads(4, 7, 128),
    "qwen2.5-7b-float32": Heads(4, 7, 128, torch.float32),
    "llama-3.2-1b": Heads(8, 4, 64),
    "llama-3.1-8b-float16": Heads(8, 4, 128, torch.float16),
    "glm-4-9b": Heads(2, 16, 128, rotary_dim=64, layout=RopeLayout.INTERLEAVED),
    "gemma-3-1b": Heads(1, 4, 256, window=17),
    "small-float32": Heads(3, 2, 32, torch.float32, rotary_dim=8, window=100),
}
LONG = [(1, 0, 3000, 1), (1, 777, 50, 131), (200, 130, 9, 1), (5, 2100, 3, 40)]


each_backend = pytest.mark.parametrize(
    "backend", ["torch", "triton"] if find_spec("triton") else ["torch"]
)


def maker(backend: str) -> MakeBackend:
    if backend == "torch":
        return TorchBackend
    from tokendance.attention.triton_backend import TritonBackend

    return TritonBackend


@each_backend
@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), agents=st.integers(1, 6), chunk=st.sampled_from([None, 5]))
def test_random_rounds(backend: str, heads: str, seed: int, agents: int, chunk: int | None) -> None:
    batch, one = random_batch(np.random.default_rng(seed), agents, chunk), HEADS[heads]
    expected = run(ReferenceBackend, batch, one.kind, one.shape, one.dtype, seed)
    result = run(maker(backend), batch, one.kind, one.shape, one.dtype, seed, device=DEVICE)
    assert_close(result, expected, backend)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("heads", ["qwen2.5-7b", "small-float32"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    agents=st.integers(1, 6),
    chunk=st.sampled_from([None, 5]),
    order=st.sampled_from(PAGE_ORDERS),
)
def test_triton_reads_the_pages_of_vllm(
    heads: str, seed: int, agents: int, chunk: int | None, order: tuple[int, int, int, int]
) -> None:
    rng, one = np.random.default_rng(seed), HEADS[heads]
    batch = in_pages(random_batch(rng, agents, chunk), 16, rng)
    expected = run(ReferenceBackend, batch, one.kind, one.shape, one.dtype, seed)
    make = partial(TritonInPages, page_size=16, order=order)
    result = run(make, batch, one.kind, one.shape, one.dtype, seed, device=DEVICE)
    assert_close(result, expected, "triton")


@each_backend
@pytest.mark.parametrize("heads", ["qwen2.5-7b", "gemma-3-1b", "small-float32"])
@pytest.mark.parametrize("sizes", LONG if IS_GPU else [(2, 40, 3, 2)], ids=str)
def test_long_contexts_and_many_agents(
    backend: str, heads: str, sizes: tuple[int, int, int, int]
) -> None:
    batch, one = long_batch(*sizes), HEADS[heads]
    expected = run(ReferenceBackend, batch, one.kind, one.shape, one.dtype, 0)
    result = run(maker(backend), batch, one.kind, one.shape, one.dtype, 0, device=DEVICE)
    assert_close(result, expected, backend)


@each_backend
def test_numbers_that_are_none_reach_those_who_read_them_only(backend: str) -> None:
    batch, heads = long_batch(2, 50, 5, 1), HEADS["qwen2.5-7b"]
    attention = maker(backend)([heads.kind], heads.head_dim, DEVICE, heads.dtype)
    attention.prepare(batch)
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(heads.kv_heads, *shape, heads.head_dim).to(DEVICE, heads.dtype)

    key, keys, values = (
        random(2).transpose(0, 1),
        random(len(batch.slot_position)),
        random(len(batch.slot_position)),
    )
    keys[:, batch.requests[1].slots[0]] = float("nan")
    result = attention.attend(
        0, random(heads.group, 2).flatten(0, 1).transpose(0, 1), key, key, keys, values, 0.1
    )
    assert result[0].isfinite().all()
    assert result[1].isnan().all()
