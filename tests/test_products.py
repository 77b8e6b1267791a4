"""Products of our own kernels: against float64, row by row, and where numbers are none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tokendance.attention.backends import native_is_there
from tokendance.errors import ConfigError
from tokendance.llm import LLM
from tokendance.models import packing
from tokendance.models.identity import identity_of
from tokendance.models.packing import NativeLinear, OneDNNLinear, pack_linear_layers, weight_bytes
from tokendance.options import EngineOptions
from tokendance.params import SamplingParams

pytestmark = pytest.mark.skipif(not native_is_there(), reason="the native kernel was not built")

if native_is_there():
    from tokendance.attention import _native

    KERNELS = _native.kernels()
else:
    KERNELS = []

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Kinds of weights with the dtype of the rows.
KINDS = [("int8", torch.float32), ("int8", torch.bfloat16), ("bfloat16", torch.bfloat16)]
each_kind = pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)


def packed(kernel: str, kind: str, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    # Memory is filled: nothing may be taken for zero that was not written.
    memory = torch.full((_native.packed_bytes(kernel, kind, inputs, outputs),), 255).byte()
    return NativeLinear(linear, kernel, kind, memory)


def can_be(kernel: str, kind: str, inputs: int) -> bool:
    return kind == "int8" or _native.has_pairs(kernel, inputs)


def in_bytes(numbers: Tensor, as_made: Tensor) -> Tensor:
    """Rows as bytes say them: multiples of a 127th of the largest of each 64 numbers.

    Which byte it is where two are as near is the kernel's to choose: `as_made` are the same rows
    as it made them, times 1. That each byte is one of the nearest is checked.
    """
    parts = []
    blocks = zip(
        torch.split(numbers.double(), 64, 1), torch.split(as_made.double(), 64, 1), strict=True
    )
    for block, made in blocks:
        scale = (block.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        whole = (made / scale).round()
        assert ((whole - block / scale).abs() < 0.5 + 1e-4).all()
        parts.append(whole * scale)
    return torch.cat(parts, 1)


@each_kernel
@each_kind
@given(
    sizes=st.tuples(st.integers(0, 30), st.integers(1, 200), st.integers(1, 80)),
    with_bias=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_products(
    kernel: str,
    kind: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    with_bias: bool,
    threads: int,
    seed: int,
) -> None:
    count, inputs, outputs = sizes
    if not can_be(kernel, kind, inputs):
        return
    torch.manual_seed(seed)
    weight, rows = torch.randn(outputs, inputs).to(dtype), torch.randn(count, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    layer = packed(kernel, kind, weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = layer(rows)
    finally:
        torch.set_num_threads(before)
    exact = rows.double() @ weight.double().T
    if kind == "int8":
        ones = torch.eye(inputs, dtype=dtype)
        bytes_of_weight = in_bytes(weight, packed(kernel, kind, weight)(ones).T)
        exact = in_bytes(rows, packed(kernel, kind, ones)(rows)) @ bytes_of_weight.T
    if bias is not None:
        exact += bias.double()
    assert result.dtype == dtype
    assert result.shape == exact.shape
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * 4)


@each_kernel
@each_kind
def test_a_row_gives_the_same_whatever_is_beside_it(
    kernel: str, kind: str, dtype: torch.dtype
) -> None:
    if not can_be(kernel, kind, 96):
        pytest.skip("not multiplied by this kernel")
    torch.manual_seed(0)
    layer = packed(kernel, kind, torch.randn(70, 96).to(dtype))
    rows = torch.randn(500, 96).to(dtype)
    together = layer(rows)
    for count in (1, 2, 3, 5, 8, 13, 50):
        for first in range(0, 100, count):
            part = layer(rows[first : first + count])
            assert torch.equal(part, together[first : first + count])
    assert torch.equal(layer(rows.view(5, 100, 96)), together.view(5, 100, 70))
    assert torch.equal(layer(rows[:, None].expand(500, 2, 96)[:, 1]), together)  # not contiguous


@each_kernel
@each_kind
def test_more_rows_than_a_task_takes(kernel: str, kind: str, dtype: torch.dtype) -> None:
    if not can_be(kernel, kind, 4096):
        pytest.skip("not multiplied by this kernel")
    torch.manual_seed(0)
    layer = packed(kernel, kind, torch.randn(40, 4096).to(dtype))
    rows = torch.randn(331, 4096).to(dtype)
    together = layer(rows)
    for row in (0, 1, 47, 48, 109, 110, 111, 330):
        assert torch.equal(layer(rows[row : row + 1])[0], together[row])


@each_kernel
@each_dtype
def test_a_weight_that_is_no_number_is_not_taken_for_one(kernel: str, dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf")):
        weight = torch.randn(5, 70).to(dtype)
        weight[3, 65] = value
        result = packed(kernel, "int8", weight)(torch.randn(2, 70).to(dtype))
        assert not torch.isfinite(result[:, 3]).any()
        assert torch.isfinite(result[:, [0, 1, 2, 4]]).all()


@each_kernel
@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_own_row(
    kernel: str, kind: str, dtype: torch.dtype, value: float
) -> None:
    if not can_be(kernel, kind, 130):
        pytest.skip("not multiplied by this kernel")
    torch.manual_seed(0)
    layer = packed(kernel, kind, torch.randn(33, 130).to(dtype))
    rows = torch.randn(9, 130).to(dtype)
    expected = layer(rows)
    for place in (0, 64, 129):
        spoiled = rows.clone()
        spoiled[4, place] = value
        result = layer(spoiled)
        assert not torch.isfinite(result[4]).any()
        others = torch.arange(9) != 4
        assert torch.equal(result[others], expected[others])


@each_kernel
@each_dtype
def test_the_smallest_and_the_largest_numbers(kernel: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -1.0] * 40, [0.0] * 80]).to(dtype)
    for kind in ("int8", "bfloat16"):
        if not can_be(kernel, kind, 80) or (kind == "bfloat16" and dtype == torch.float32):
            continue
        layer = packed(kernel, kind, weight)
        for size in (0.0, 1e-40, 1e-30, 1e-10, 1e30):
            rows = torch.zeros(1, 80, dtype=dtype)
            rows[0, 2] = size
            result = layer(rows).double()
            # Numbers as small as these are as good as nothing.
            torch.testing.assert_close(
                result, torch.tensor([[size, 0.0]]).double(), rtol=2**-7, atol=1e-30
            )


@each_kernel
def test_what_does_not_fit_is_refused(kernel: str) -> None:
    with pytest.raises(ValueError, match="bfloat16 or int8"):
        _native.packed_bytes(kernel, "int4", 8, 8)
    with pytest.raises(ValueError, match="no kernel of this name"):
        _native.packed_bytes("none", "int8", 8, 8)
    weight = torch.randn(10, 64)
    size = _native.packed_bytes(kernel, "int8", 64, 10)
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small, or not aligned"):
        _native.PackedWeights(kernel, "int8", weight, None, memory[: size - 1])
    with pytest.raises(ValueError, match="too small, or not aligned"):
        _native.PackedWeights(kernel, "int8", weight, None, memory[1:])
    with pytest.raises(ValueError, match="contiguous"):
        _native.PackedWeights(kernel, "int8", weight.T, None, memory)
    with pytest.raises(ValueError, match="bias"):
        _native.PackedWeights(kernel, "int8", weight, torch.zeros(9), memory)
    large = torch.zeros(2**16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"kept in bfloat16|not multiplied"):
        _native.PackedWeights(kernel, "bfloat16", weight, None, large)
    layer = _native.PackedWeights(kernel, "int8", weight, None, memory)
    rows, output = torch.zeros(3, 64), torch.zeros(3, 10)
    for wrong, to in (
        (rows[:, :63], output),
        (rows, output[:2]),
        (rows, output.bfloat16()),
        (rows.double(), output.double()),
        (rows.T.contiguous().T, output),
        (rows[0], output[0]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - of one kind: what is not as it has to be
            layer.multiply(wrong, to, 1)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_layers_are_replaced_by_what_is_fastest_here(
    has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles, raising=False)

    def model(dtype: torch.dtype) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(dtype)

    exact = model(torch.float32)
    assert pack_linear_layers(exact) == 2
    assert {type(exact[0]), type(exact[2])} == {OneDNNLinear}
    # The norm's 8 numbers, and 44 of the layers.
    assert weight_bytes(exact) == 4 * (8 + 44)
    half = model(torch.bfloat16)
    assert pack_linear_layers(half) == 2
    is_ours = _native.has_pairs(KERNELS[0], 8) and not has_tiles
    expected = NativeLinear if is_ours else OneDNNLinear
    assert {type(half[0]), type(half[2])} == {expected}
    assert pack_linear_layers(model(torch.float16)) == 0
    for dtype in (torch.float32, torch.bfloat16):
        small = model(dtype)
        rows = torch.randn(5, 8).to(dtype)
        with torch.inference_mode():
            before = small(rows)
            assert pack_linear_layers(small, "int8") == 2
            torch.testing.assert_close(small(rows), before, rtol=0.05, atol=0.05)


def test_an_engine_with_weights_in_bytes(model_folder: Callable[..., Path]) -> None:
    """What it says is the same with and without reuse of beginnings, and nobody reads its KV."""
    folder = str(model_folder("llama", max_position_embeddings=4096))
    prompts = [list(range(10, 70)), [*range(10, 50), 7, 8, 9]]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    said = {}
    for reuse in ("none", "prefix"):
        llm = LLM(folder, dtype="float32", weights="int8", reuse=reuse, kv_budget=2**24)
        said[reuse] = [output.token_ids for output in llm.generate(prompts, params)]
        assert llm.model.weights == "int8"
    assert said["none"] == said["prefix"]
    plain = LLM(folder, dtype="float32", kv_budget=2**24)
    assert identity_of(plain.model) != identity_of(llm.model)
    # A fidelity target goes by what was measured with these weights.
    assert (plain.model.precision, llm.model.precision) == ("float32", "float32-int8")
    assert plain.encoder.salt != llm.encoder.salt
    with pytest.raises(ConfigError, match="no weights 'int4'"):
        EngineOptions(weights="int4")  # type: ignore[arg-type]


def test_bytes_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="float16"):
        pack_linear_layers(nn.Linear(4, 4).half(), "int8")
    monkeypatch.setattr(packing, "native_is_there", lambda: False)
    with pytest.raises(ConfigError, match="native kernel"):
        pack_linear_layers(nn.Linear(4, 4), "int8")
    assert pack_linear_layers(nn.Sequential(nn.Linear(4, 4))) == 1
