"""Compression of KV to one byte per number: how far off, and how small."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance.errors import CacheError, ConfigError
from tokendance.store.compression import (
    CompressedTensor,
    compress_keys,
    compress_layer,
    compress_values,
)
from tokendance.store.dense import LayerKV
from tokendance.store.floats import BFLOAT16, KVArray, largest, narrow, widen

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


@settings(max_examples=300, deadline=None)
@given(tensors(), st.integers(1, 80))
def test_no_number_is_farther_off_than_half_a_scale(numbers: KVArray, chunk_tokens: int) -> None:
    before = numbers.copy()
    keys, values = compress_keys(numbers, chunk_tokens), compress_values(numbers)
    assert_near(numbers, keys)
    assert_near(numbers, values)
    assert np.array_equal(numbers, before)
    tokens, heads, size = numbers.shape
    chunks = -(-tokens // chunk_tokens)
    assert keys.num_bytes == tokens * heads * size + 8 * chunks * heads * size
    assert values.num_bytes == tokens * heads * (size + 4)
    assert keys.dense_bytes == values.dense_bytes == numbers.nbytes


@DTYPES
def test_ratio_is_as_documented(dtype: np.dtype[Any]) -> None:
    layer = LayerKV(*(np.zeros((1024, 3, 64), dtype) for _ in range(2)))
    found = compress_layer(layer)
    wanted = dtype.itemsize / (1 + 1 / 16)  # 1.88 or 3.76
    assert found.keys.dense_bytes / found.keys.num_bytes == wanted
    assert found.values.dense_bytes / found.values.num_bytes == wanted
    assert found.num_bytes == found.keys.num_bytes + found.values.num_bytes
    assert found.dense_bytes == layer.num_bytes


@DTYPES
def test_a_layer_comes_back(dtype: np.dtype[Any]) -> None:
    random = np.random.default_rng(1)
    numbers = random.standard_normal((2, 100, 2, 16)).astype(np.float32)
    layer = LayerKV(*narrow(numbers, dtype))
    back = compress_layer(layer).decompress()
    np.testing.assert_allclose(widen(back.keys), widen(layer.keys), atol=0.03)
    np.testing.assert_allclose(widen(back.values), widen(layer.values), atol=0.03)
    assert np.array_equal(compress_keys(layer.keys).decompress(), back.keys)
    assert np.array_equal(compress_values(layer.values).decompress(), back.values)


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
    assert found.num_bytes == 0
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
    with pytest.raises(CacheError, match="1 of the 80 numbers"):
        compress(narrow(numbers, dtype))


def test_what_is_no_kv_is_refused() -> None:
    with pytest.raises(CacheError, match="kv_heads, head_dim"):
        compress_keys(np.zeros((3, 4), np.float32))
    with pytest.raises(CacheError, match="Give them as one of"):
        compress_values(np.zeros((3, 1, 4), np.float64))
    with pytest.raises(ConfigError, match="chunk_tokens"):
        compress_keys(np.zeros((3, 1, 4), np.float32), 0)
