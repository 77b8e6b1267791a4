"""Decoder layers in few calls, against those of transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import AutoModelForCausalLM

from tiny_models import MODELS, save_model
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.attention.backends import native_is_there
from tokendance.models import demo, hook, loader
from tokendance.models.fused import FusedLayer, fuse_layers
from tokendance.options import EngineOptions, Weights

pytestmark = pytest.mark.skipif(not native_is_there(), reason="the native kernel was not built")

if native_is_there():
    from tokendance.attention import _native

    KERNELS = _native.kernels()
else:
    KERNELS = []

DTYPES = [torch.float32, torch.bfloat16]
NOT_FUSED = {"phi3", "olmo3"}  # made of other parts
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Rows and numbers of each: one row, tails behind whole vectors, more than one thread takes.
each_shape = pytest.mark.parametrize("shape", [(1, 576), (3, 37), (700, 96)])


def close(result: Tensor, expected: Tensor) -> None:
    tolerance = 1e-6 if result.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@each_kernel
@each_dtype
@each_shape
@pytest.mark.parametrize("from_one", [False, True])
def test_norm(kernel: str, dtype: torch.dtype, shape: tuple[int, int], from_one: bool) -> None:
    torch.manual_seed(0)
    rows, added = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    ops = _native.RowOps(kernel)

    def expected(rows: Tensor) -> Tensor:
        wide = rows.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        if from_one:
            return (normed * (weight.double() + 1)).to(dtype)
        return (normed.to(dtype).double() * weight.double()).to(dtype)

    output, sums = torch.empty_like(rows), torch.empty_like(rows)
    ops.normalise(rows, None, None, weight, 1e-5, from_one, output, 2)
    close(output, expected(rows))
    ops.normalise(rows[None], added[None], sums[None], weight, 1e-5, from_one, output[None], 2)
    assert torch.equal(sums, rows + added)
    close(output, expected(sums))


@each_kernel
@each_dtype
@each_shape
@pytest.mark.parametrize(
    ("name", "activation"), [("silu", silu), ("gelu_tanh", partial(gelu, approximate="tanh"))]
)
def test_gate(
    kernel: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    name: str,
    activation: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(shape[0], 2 * shape[1]) * 4).to(dtype)
    rows[0, :4] = torch.tensor([0.0, -200.0, 200.0, float("nan")])
    output = rows.new_empty(shape)
    _native.RowOps(kernel).gate(rows, name, output, 2)
    gates, values = rows.double().chunk(2, dim=1)
    expected = activation(gates).to(dtype).double() * values
    torch.testing.assert_close(
        output,
        expected.to(dtype),
        rtol=1e-5 if dtype == torch.float32 else 2**-6,
        atol=1e-5 if dtype == torch.float32 else 2**-8,
        equal_nan=True,
    )


@each_kernel
@each_dtype
@pytest.mark.parametrize(("size", "rotary"), [(64, 64), (48, 20)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_rotation(kernel: str, dtype: torch.dtype, size: int, rotary: int, has_norms: bool) -> None:
    torch.manual_seed(0)
    heads, kv_heads, num_rows = 3, 2, 50
    rows = torch.randn(num_rows, (heads + 2 * kv_heads) * size).to(dtype)
    cosines, sines = torch.randn(2, num_rows, rotary).to(dtype)
    weights = torch.randn(2, size).to(dtype) if has_norms else [None, None]
    expected = rows.clone().view(num_rows, -1, size)
    for first, last, weight in ((0, heads, weights[0]), (heads, heads + kv_heads, weights[1])):
        part = expected[:, first:last].double()
        if weight is not None:
            part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5)
            part = (part.to(dtype).double() * weight.double()).to(dtype).double()
        a, b = part[..., : rotary // 2], part[..., rotary // 2 : rotary]
        turned = torch.cat((-b, a), dim=-1) * sines.double()[:, None]
        part[..., :rotary] = part[..., :rotary] * cosines.double()[:, None] + turned
        expected[:, first:last] = part.to(dtype)
    _native.RowOps(kernel).rotate(
        rows, heads, kv_heads, size, cosines, sines, weights[0], weights[1], 1e-5, False, 2
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(rows, expected.view(num_rows, -1), rtol=tolerance, atol=tolerance)


def test_what_would_read_or_write_elsewhere_is_refused() -> None:
    ops = _native.RowOps(KERNELS[0])
    rows, weight, output = torch.zeros(4, 8), torch.zeros(8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="other shapes"):
        ops.normalise(rows, None, None, weight, 1e-5, False, output[:3], 1)
    with pytest.raises(ValueError, match="contiguous"):
        ops.normalise(torch.zeros(8, 4).T, None, None, weight, 1e-5, False, output, 1)
    with pytest.raises(ValueError, match="one number for each"):
        ops.normalise(rows, None, None, weight[:7], 1e-5, False, output, 1)
    with pytest.raises(ValueError, match="one dtype"):
        ops.normalise(rows, None, None, weight.bfloat16(), 1e-5, False, output, 1)
    with pytest.raises(ValueError, match="dtype must be"):
        ops.normalise(rows.half(), None, None, weight.half(), 1e-5, False, output.half(), 1)
    with pytest.raises(ValueError, match="other shapes"):
        ops.gate(rows, "silu", output, 1)
    with pytest.raises(ValueError, match="no such activation"):
        ops.gate(torch.zeros(4, 16), "relu", output, 1)
    tables = torch.zeros(4, 4), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="fewer numbers than its heads"):
        ops.rotate(rows, 2, 1, 4, *tables, None, None, 0.0, False, 1)
    with pytest.raises(ValueError, match="more is rotated"):
        ops.rotate(rows, 2, 1, 2, *tables, None, None, 0.0, False, 1)
    with pytest.raises(ValueError, match="other shapes"):
        ops.rotate(rows[:3], 1, 1, 4, *tables, None, None, 0.0, False, 1)


def logits_of(model: nn.Module) -> Tensor:
    """Of some tokens, at positions of their own."""
    tokens = torch.arange(3, 60) % 50
    positions = torch.arange(57) + 7
    return hook.forward(model, tokens, positions, torch.arange(57), hook.PlainAttention()).float()


@pytest.mark.parametrize("architecture", MODELS)
@each_dtype
def test_a_model_says_the_same(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, architecture)
    name = loader.dtype_name(dtype)
    fused = loader.load_model(str(tmp_path), name).module
    layers = fused.base_model.layers  # type: ignore[union-attr]
    is_fused = [isinstance(layer, FusedLayer) for layer in layers]  # type: ignore[union-attr]
    assert all(is_fused) != (architecture in NOT_FUSED)
    assert any(is_fused) == all(is_fused)
    monkeypatch.setattr(loader, "fuse_layers", lambda _: 0)
    plain = loader.load_model(str(tmp_path), name).module
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(fused), logits_of(plain), rtol=1e-4, atol=1e-4)
    else:  # as near to float32
        exact = logits_of(loader.load_model(str(tmp_path), "float32").module)
        assert (logits_of(fused) - exact).norm() <= 1.2 * (logits_of(plain) - exact).norm()


@pytest.mark.demo
@pytest.mark.parametrize("name", demo.MODELS)
def test_a_demo_model_is_nearer_to_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or as near: in bfloat16 fewer results are rounded."""
    fused = logits_of(loader.load_model(name, "bfloat16").module)
    monkeypatch.setattr(loader, "fuse_layers", lambda _: 0)
    plain = logits_of(loader.load_model(name, "bfloat16").module)
    exact = logits_of(loader.load_model(name, "float32").module)
    assert (fused - exact).norm() <= 1.1 * (plain - exact).norm()


class Counting:
    """A `DecoderLayer` that counts its calls."""

    def __init__(self, whole: "_native.DecoderLayer") -> None:
        self.whole, self.num_calls = whole, 0

    def forward(self, *args: Any) -> None:
        self.num_calls += 1
        self.whole.forward(*args)


@pytest.mark.parametrize("architecture", sorted(MODELS.keys() - NOT_FUSED))
@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "native")]
)
@each_kernel
def test_a_layer_in_one_call_says_the_same(
    architecture: str,
    dtype: str,
    weights: Weights,
    kernel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit: prompts that share a run, and steps of one row and of several."""
    monkeypatch.setattr(_native, "kernels", lambda: [kernel])
    if weights == "native" and not _native.has_pairs(kernel, 2):
        pytest.skip("this kernel does not multiply pairs of bfloat16")
    save_model(tmp_path, architecture)
    model = loader.load_model(str(tmp_path), dtype, weights=weights)
    layers = [layer for layer in model.module.modules() if isinstance(layer, FusedLayer)]
    whole = [Counting(layer._whole) for layer in layers if layer._whole is not None]
    assert len(whole) == len(layers) == model.shape.num_layers
    blocks = [shared([5 + number] * 9 + [40]) for number in range(3)]
    prompts = [
        Prompt([private([20 + agent] * (3 + agent)), *blocks, private([30])]) for agent in range(3)
    ]
    params = SamplingParams(max_tokens=5, ignore_eos=True, keep_logprobs=True)
    said = []
    for parts in (whole, [None] * len(layers)):
        for layer, part in zip(layers, parts, strict=True):
            layer._whole = part  # type: ignore[assignment]
        llm = LLM.from_loaded(model, EngineOptions(kv_budget="8MiB", attention="native"))
        outputs = [*llm.run_round(prompts, params).outputs, *llm.generate([[7, 8, 9]], params)]
        said.append([(output.token_ids, output.logprobs) for output in outputs])
    assert all(part.num_calls >= 10 for part in whole)
    for (ids, logprobs), (expected_ids, expected) in zip(*said, strict=True):
        assert ids == expected_ids
        assert torch.equal(torch.stack(logprobs), torch.stack(expected))


def test_a_layer_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    model = loader.load_model(str(tmp_path), "float32", weights="int8")
    layer = next(one for one in model.module.modules() if isinstance(one, FusedLayer))
    attention, mlp = layer.self_attn, layer.mlp
    norm = layer._before.parts

    def make(size: int = layer._size, down: Any = mlp.down_proj, norm: Any = norm) -> None:
        _native.DecoderLayer(
            KERNELS[0],
            attention.qkv.packed,  # type: ignore[arg-type]
            attention.o_proj.packed,  # type: ignore[arg-type]
            mlp.gate_up.packed,  # type: ignore[arg-type]
            down.packed,
            layer._num_heads,
            layer._num_kv_heads,
            size,
            "silu",
            norm,
            None,
            norm,
            None,
            None,
            None,
        )

    make()
    with pytest.raises(ValueError, match="fit each other"):
        make(size=2 * layer._size)
    with pytest.raises(ValueError, match="fit each other"):
        make(down=mlp.gate_up)
    with pytest.raises(ValueError, match="one number for each"):
        make(norm=(norm[0][1:], *norm[1:]))


def scale_what_it_adds(layer: Any, factor: Callable[[Tensor], Tensor | float]) -> None:
    forward = layer.forward

    def scaled(rows: Tensor, **others: Any) -> Tensor:
        added: Tensor = forward(rows, **others) - rows
        return rows + factor(others["position_ids"][..., None]) * added

    layer.forward = scaled


def hook_on(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


def lose_a_number(layer: Any) -> None:
    layer.input_layernorm.weight.data[0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(partial(scale_what_it_adds, factor=lambda _: 0.5), id="scaled"),
        pytest.param(
            partial(scale_what_it_adds, factor=lambda positions: 1 + (positions > 60)), id="far"
        ),
        hook_on,
        lose_a_number,
    ],
)
def test_a_layer_that_does_something_else_stays_as_it_is(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    """It has the parts that are fused, and something is odd."""
    save_model(tmp_path, "llama")
    hook.register()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=hook.ATTENTION_NAME
    ).eval()
    change(model.base_model.layers[1])
    expected = logits_of(model)
    assert fuse_layers(model) == 2
    assert not isinstance(model.base_model.layers[1], FusedLayer)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
