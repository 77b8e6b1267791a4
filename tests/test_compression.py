"""Compression of KV to one byte per number: how far off, and how small."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.disk.compression import (
    CompressedTensor,
    NotFiniteError,
    compress_keys,
    compress_values,
)
from tokendance.disk.floats import BFLOAT16, KVArray, largest, narrow, widen

DTYPE_LIST: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
DTYPES = pytest.mark.parametrize("dtype", DTYPE_LIST, ids=["float32", "float16", "bfloat16"])
# Half the distance between two numbers next to 1.
ROUNDING = {DTYPE_LIST[0]: 2.0**-24, DTYPE_LIST[1]: 2.0**-11, BFLOAT16: 2.0**-8}
SMALLEST = {DTYPE_LIST[0]: 2.0**-149, DTYPE_LIST[1]: 2.0**-24, BFLOAT16: 2.0**-133}
KINDS: list[Callable[[KVArray], CompressedTensor]] = [compress_keys, compress_values]


@st.composite
def tensors(draw: st.DrawFn) -> KVArray:
    """Channels of any size and middle, up to the largest and the smallest numbers there are."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPE_LIST))
    shape = (draw(st.integers(0, 70)), draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    limit = largest(dtype)
    exponents = st.sampled_from([-40, -6, -1, 0, 1, 3, 38])
    numbers = random.standard_normal(shape) * 10.0 ** draw(exponents)
    numbers += random.standard_normal(shape[1:]) * 10.0 ** draw(exponents)
    numbers[:, random.random(shape[1:]) < 0.2] = draw(st.sampled_from([0.0, limit, -limit, 1.5]))
    return narrow(np.clip(numbers, -limit, limit).astype(np.float32), dtype)


def stored_bytes(compressed: CompressedTensor) -> int:
    centers = 0 if compressed.centers is None else compressed.centers.nbytes
    return compressed.codes.nbytes + compressed.scales.nbytes + centers


def assert_near(numbers: KVArray, found: CompressedTensor) -> None:
    """Within half a scale, and the rounding of the dtype."""
    back = found.decompress()
    assert back.dtype == numbers.dtype
    assert back.shape == numbers.shape
    assert found.codes.dtype == np.int8
    assert (found.codes >= -127).all()
    true, near = widen(numbers).astype(np.float64), widen(back).astype(np.float64)
    assert np.isfinite(near).all()
    scales = np.repeat(found.scales, found.chunk_tokens, axis=0)[: len(numbers)].astype(np.float64)
    # One part in a thousand is for the arithmetic in float32, when the dtype is a smaller one.
    allowed = scales / 2 + np.maximum(np.abs(near), np.abs(true)) * ROUNDING[numbers.dtype]
    assert (np.abs(true - near) <= allowed * 1.001 + SMALLEST[numbers.dtype]).all()


@settings(max_examples=examples(300))
@given(tensors(), st.integers(1, 80))
def test_no_number_is_farther_off_than_half_a_scale(numbers: KVArray, chunk_tokens: int) -> None:
    before = numbers.copy()
    keys, values = compress_keys(numbers, chunk_tokens), compress_values(numbers)
    assert_near(numbers, keys)
    assert_near(numbers, values)
    assert np.array_equal(numbers, before)
    tokens, heads, size = numbers.shape
    chunks = -(-tokens // chunk_tokens)
    assert stored_bytes(keys) == tokens * heads * size + 8 * chunks * heads * size
    assert stored_bytes(values) == tokens * heads * (size + 4)


@DTYPES
def test_ratio_is_as_documented(dtype: np.dtype[Any]) -> None:
    numbers = np.zeros((1024, 3, 64), dtype)
    wanted = dtype.itemsize / (1 + 1 / 16)  # 1.88 or 3.76
    for compress in KINDS:
        assert numbers.nbytes / stored_bytes(compress(numbers)) == wanted


@DTYPES
def test_a_layer_comes_back(dtype: np.dtype[Any]) -> None:
    random = np.random.default_rng(1)
    numbers = random.standard_normal((2, 100, 2, 16)).astype(np.float32)
    for compress, tensor in zip(KINDS, narrow(numbers, dtype), strict=True):
        back = compress(tensor).decompress()
        np.testing.assert_allclose(widen(back), widen(tensor), atol=0.03)


@DTYPES
def test_channels_that_do_not_change_are_exact(dtype: np.dtype[Any]) -> None:
    channels = narrow(np.linspace(-300, 300, 32).astype(np.float32).reshape(2, 16), dtype)
    keys = np.broadcast_to(channels, (50, 2, 16)).copy()
    assert np.array_equal(compress_keys(keys).decompress(), keys)


@DTYPES
@pytest.mark.parametrize("compress", KINDS)
def test_zeros_are_exact(
    dtype: np.dtype[Any], compress: Callable[[KVArray], CompressedTensor]
) -> None:
    zeros = np.zeros((10, 2, 4), dtype)
    assert not compress(zeros).decompress().any()


@DTYPES
@pytest.mark.parametrize("compress", KINDS)
def test_nothing_is_compressed_to_nothing(
    dtype: np.dtype[Any], compress: Callable[[KVArray], CompressedTensor]
) -> None:
    found = compress(np.zeros((0, 2, 4), dtype))
    assert stored_bytes(found) == 0
    assert found.decompress().shape == (0, 2, 4)
    assert found.decompress().dtype == dtype


def test_a_channel_far_from_zero_keeps_its_digits() -> None:
    """What the centers are for: with a scale from zero it would be 100 times farther off."""
    random = np.random.default_rng(2)
    keys = (100 + random.uniform(-1, 1, (128, 1, 8))).astype(np.float32)
    found = compress_keys(keys)
    assert found.scales.max() <= 2 / 254 * 1.001
    assert_near(keys, found)


def test_one_large_channel_harms_no_other_in_keys() -> None:
    random = np.random.default_rng(3)
    keys = random.standard_normal((128, 1, 8)).astype(np.float32)
    keys[..., 3] *= 1000
    error = np.abs(compress_keys(keys).decompress() - keys)
    assert error[..., [0, 1, 2, 4, 5, 6, 7]].max() < 0.02


def test_one_large_token_harms_no_other_in_values() -> None:
    random = np.random.default_rng(4)
    values = random.standard_normal((128, 2, 8)).astype(np.float32)
    values[5, 1] *= 1000
    error = np.abs(compress_values(values).decompress() - values)
    error[5, 1] = 0
    assert error.max() < 0.02


@DTYPES
@pytest.mark.parametrize("compress", KINDS)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(
    dtype: np.dtype[Any], compress: Callable[[KVArray], CompressedTensor], number: float
) -> None:
    numbers = np.zeros((10, 2, 4), np.float32)
    numbers[3, 1, 2] = number
    with pytest.raises(NotFiniteError, match="1 of the 80 numbers"):
        compress(narrow(numbers, dtype))


def test_what_is_no_kv_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads, head_dim"):
        compress_keys(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="float64"):
        compress_values(np.zeros((3, 1, 4), np.float64))
    with pytest.raises(ValueError, match="chunk_tokens"):
        compress_keys(np.zeros((3, 1, 4), np.float32), 0)


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
