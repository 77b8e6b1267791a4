"""Decoder layers in few calls: what lies between their products is done by native code.

A layer of transformers makes some forty calls for its norms, rotations and activations, each of
which reads and writes all of a step's rows; where one request decodes, Python and the calls take
longer than the products. A `FusedLayer` makes four, and multiplies queries, keys and values in one
product, as it does the two of the gate. Where its products are our own kernel's, too, it makes one
for the few rows of a decoding step (`join_layers`), and lets go of the interpreter once. Which
layers can be fused is not told by a list of models: a layer that has the parts is fused, and has to
do what transformers' layer does, on numbers. (That one call gives the same as four is a matter of
this code alone, and of its tests.)
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

from tokendance.attention.backends import native_is_there
from tokendance.models import hook
from tokendance.models.packing import NativeLinear
from tokendance.models.support import max_context

if TYPE_CHECKING:  # it may not be built
    from tokendance.attention._native import DecoderLayer, RowOps
    from tokendance.attention.native_backend import Place

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
_NUM_CHECKED = 5  # tokens
# By which part of what a layer changes the fused one may differ in float32, whose sums have another
# order.
_TOLERANCE = 1e-4
_NUM_ROUNDED = 4  # times that what is given is rounded on its way
_DTYPES = (torch.float32, torch.bfloat16)
# More rows take so long that the calls do not matter. What native code makes on the way lies in
# memory that its thread keeps; for more rows torch's memory is used, which is given back.
_MOST_JOINED_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    """A root mean square norm (arXiv 1910.07467).

    Attributes:
        weight: (n,).
        epsilon: added to the mean square.
        from_one: whether the factor is 1 + weight, as in Gemma.
    """

    weight: Tensor
    epsilon: float
    from_one: bool

    @property
    def parts(self) -> tuple[Tensor, float, bool]:
        """As native code takes it."""
        return self.weight, self.epsilon, self.from_one

    def is_like(self, other: "_Norm") -> bool:
        """Whether it does the same, with weights of its own."""
        return (self.epsilon, self.from_one) == (other.epsilon, other.from_one)


class _Gate(nn.Module):
    """A gated feed-forward part, its first two products in one."""

    def __init__(self, gate_up: nn.Linear, down: nn.Linear, activation: str, ops: "RowOps") -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down
        self.activation, self._ops = activation, ops

    def forward(self, rows: Tensor) -> Tensor:
        both = self.gate_up(rows)
        active = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        self._ops.gate(both, self.activation, active, torch.get_num_threads())
        result: Tensor = self.down_proj(active)
        return result


class _Heads(nn.Module):
    """The products around attention."""

    def __init__(self, qkv: nn.Linear, output: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.o_proj = qkv, output


class FusedLayer(nn.Module):
    """Does what a decoder layer of transformers does, for a packed batch."""

    def __init__(self, layer: Any, index: int, ops: "RowOps") -> None:
        """Take the weights of a layer; see `fuse_layers`.

        Raises:
            _OtherLayerError: if it lacks a part, or has one more.
        """
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        _expect(attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
        _expect(mlp, {"gate_proj", "up_proj", "down_proj"}, {"act_fn"})
        between = {"post_attention_layernorm"}
        self._sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        if self._sandwiched:  # norms before and after each part, as in Gemma
            between |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
        _expect(layer, {"self_attn", "mlp", "input_layernorm"} | between, set())
        if attention.layer_idx != index or any(map(_has_hooks, layer.modules())):
            raise _OtherLayerError
        if len({parameter.dtype for parameter in layer.parameters()}) > 1:
            raise _OtherLayerError
        self._index, self._ops = index, ops
        self._scale = float(attention.scaling)
        self._size = int(attention.head_dim)
        self._num_heads = attention.q_proj.out_features // self._size
        self._num_kv_heads = attention.k_proj.out_features // self._size
        self._before = _norm_of(layer.input_layernorm)
        self._after_attention = self._after_mlp = None
        if self._sandwiched:
            self._after_attention = _norm_of(layer.post_attention_layernorm)
            self._between = _norm_of(layer.pre_feedforward_layernorm)
            self._after_mlp = _norm_of(layer.post_feedforward_layernorm)
        else:
            self._between = _norm_of(layer.post_attention_layernorm)
        self._of_query = self._of_key = None
        if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
            self._of_query, self._of_key = _norm_of(attention.q_norm), _norm_of(attention.k_norm)
            if not self._of_query.is_like(self._of_key):
                raise _OtherLayerError
        qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.self_attn = _Heads(qkv, attention.o_proj)
        self._whole: DecoderLayer | None = None
        gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.mlp = _Gate(gate_up, mlp.down_proj, _activation_of(mlp.act_fn), ops)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        tokendance: hook.LayerHook,
        **_: Any,
    ) -> Tensor:
        """Compute the layer.

        Args:
            hidden_states: (1, T, n).
            position_embeddings: cosines and sines, (1, T, rotary_dim) each.
            tokendance: what attends.
        """
        if self._whole is not None and hidden_states.shape[1] <= _MOST_JOINED_ROWS:
            place = tokendance.place(self._index)
            if place is not None:
                return self._in_one_call(self._whole, hidden_states, position_embeddings, place)
        rows = self.self_attn.qkv(self._normed(hidden_states, self._before))
        self._rotate(rows, *position_embeddings)
        num_rows, num = hidden_states.shape[1], self._num_kv_heads
        heads = rows.view(num_rows, -1, self._size)
        query, key, value = heads.split((self._num_heads, num, num), dim=1)
        attended = tokendance.attend(self._index, query, key, value, self._scale, {})
        part = self.self_attn.o_proj(attended.reshape(1, num_rows, -1))
        if self._after_attention is not None:
            part = self._normed(part, self._after_attention)
        sums, normed = self._added(hidden_states, part, self._between)
        part = self.mlp(normed)
        if self._after_mlp is not None:
            part = self._normed(part, self._after_mlp)
        return sums.add_(part)

    def _in_one_call(
        self,
        whole: "DecoderLayer",
        rows: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        place: "Place",
    ) -> Tensor:
        output = torch.empty_like(rows)
        whole.forward(
            rows,
            *position_embeddings,
            place.step,
            place.keys,
            place.values,
            place.key_begin,
            place.cosines,
            place.sines,
            place.interleaved,
            self._scale,
            output,
            torch.get_num_threads(),
        )
        return output

    def join(self) -> None:
        """Make the layer one call from now on, if our kernel has all its products."""
        from tokendance.attention import _native

        attention, mlp = self.self_attn, self.mlp
        qkv, output, gate_up, down = (
            product.packed if isinstance(product, NativeLinear) else None
            for product in (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)
        )
        if qkv is None or output is None or gate_up is None or down is None:
            return
        self._whole = _native.DecoderLayer(
            _native.kernels()[0],
            qkv,
            output,
            gate_up,
            down,
            self._num_heads,
            self._num_kv_heads,
            self._size,
            mlp.activation,
            self._before.parts,
            _parts(self._after_attention),
            self._between.parts,
            _parts(self._after_mlp),
            _parts(self._of_query),
            _parts(self._of_key),
        )

    def _added(self, rows: Tensor, part: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        sums = torch.empty_like(rows)
        return sums, self._normed(rows, norm, part, sums)

    def _normed(
        self, rows: Tensor, norm: _Norm, added: Tensor | None = None, sums: Tensor | None = None
    ) -> Tensor:
        """The norm of rows; or of their sums with others, which are written, too."""
        output = torch.empty_like(rows)
        self._ops.normalise(
            rows,
            added,
            sums,
            norm.weight,
            norm.epsilon,
            norm.from_one,
            output,
            torch.get_num_threads(),
        )
        return output

    def _rotate(self, rows: Tensor, cosines: Tensor, sines: Tensor) -> None:
        of_query, of_key = self._of_query, self._of_key
        self._ops.rotate(
            rows,
            self._num_heads,
            self._num_kv_heads,
            self._size,
            cosines,
            sines,
            None if of_query is None else of_query.weight,
            None if of_key is None else of_key.weight,
            0.0 if of_query is None else of_query.epsilon,
            of_query is not None and of_query.from_one,
            torch.get_num_threads(),
        )


class _OtherLayerError(Exception):
    """A layer that is not made of the parts that are fused."""


# What a layer of other parts may lead to: it stays as it is.
_OTHER_ERRORS = (
    _OtherLayerError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _expect(module: Any, needed: set[str], allowed: set[str]) -> None:
    """Whether a module has these parts with weights or without, and no others."""
    parts = {name for name, _ in module.named_children()} | set(module._parameters)
    if not needed <= parts or not parts <= needed | allowed:
        raise _OtherLayerError


def _has_hooks(module: nn.Module) -> bool:
    """Whether something else is called before or after it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _joined(*linears: Any) -> nn.Linear:
    """One product in place of several of the same rows."""
    if any(type(linear) is not nn.Linear for linear in linears):
        raise _OtherLayerError
    biases = [linear.bias for linear in linears]
    if any(bias is None for bias in biases) != all(bias is None for bias in biases):
        raise _OtherLayerError
    first = linears[0]
    with torch.device("meta"):
        joined = nn.Linear(first.in_features, 1, bias=biases[0] is not None)
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), False)
    joined.out_features = len(joined.weight)
    if biases[0] is not None:
        joined.bias = nn.Parameter(torch.cat(biases), False)
    return joined


def _norm_of(module: Any) -> _Norm:
    """What a norm of a model of transformers does, found by what it does to some numbers."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        raise _OtherLayerError
    numbers = torch.linspace(-2, 3, len(weight))
    normed = numbers * torch.rsqrt(numbers.square().mean() + epsilon)
    expected = deepcopy(module).float()(numbers)
    for from_one in (False, True):
        if _is_near(normed * (weight.float() + from_one), expected):
            return _Norm(weight.detach(), epsilon, from_one)
    raise _OtherLayerError


def _activation_of(module: Any) -> str:
    numbers = torch.linspace(-30, 30, 601)
    expected = module(numbers)
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(function(numbers), expected, rtol=1e-5, atol=1e-5):
            return name
    raise _OtherLayerError


def _is_near(result: Tensor, expected: Tensor, given: Tensor | float = 0.0) -> bool:
    """Whether a part does what it is expected to do, by what it changes of each row it is given."""
    distance, change, size = (
        rows.norm(dim=-1) for rows in (result - expected, expected - given, expected)
    )
    most = _TOLERANCE * change + _NUM_ROUNDED * torch.finfo(torch.float32).eps * size
    return bool((distance <= most).all())


@torch.inference_mode()
def fuse_layers(model: PreTrainedModel) -> int:
    """Replace the decoder layers of a model on a CPU that can be fused; return how many.

    It is loaded with the attention `hook.ATTENTION_NAME`, and its linear layers are torch's own.
    """
    parameter = next(model.parameters())
    layers = getattr(getattr(model, "base_model", None), "layers", None)
    if parameter.device.type != "cpu" or parameter.dtype not in _DTYPES:
        return 0
    if not isinstance(layers, nn.ModuleList) or not native_is_there():
        return 0
    from tokendance.attention import _native

    ops = _native.RowOps(_native.kernels()[0])
    embedded = int(model.get_input_embeddings().num_embeddings)
    given = _run(model, layers, (100 + torch.arange(_NUM_CHECKED)) % embedded)
    # One of each kind is tried: in a large model to try one takes half a second.
    can_fuse: dict[object, bool] = {}
    for index, layer in enumerate(layers):
        try:
            fused = FusedLayer(layer, index, ops)
            kind = _kind_of(layer)
            if kind not in can_fuse:
                can_fuse[kind] = _does_the_same(layer, index, ops, *given[index])
        except _OTHER_ERRORS:
            continue
        if can_fuse[kind]:
            layers[index] = fused
    return sum(isinstance(layer, FusedLayer) for layer in layers)


def join_layers(model: nn.Module) -> None:
    """Make each fused layer one call for few rows, where our kernel has its products.

    Its linear layers are packed (`models/packing.py`).
    """
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            layer.join()


def _parts(norm: _Norm | None) -> tuple[Tensor, float, bool] | None:
    return None if norm is None else norm.parts


def _kind_of(layer: nn.Module) -> object:
    """All that a layer is, but for its weights and its place."""
    settings = (
        (name, setting, repr(value))
        for name, part in layer.named_modules()
        for setting, value in vars(part).items()
        if not setting.startswith("_") and setting not in ("layer_idx", "config")
    )
    return repr(layer), tuple(settings)


def _does_the_same(
    layer: nn.Module, index: int, ops: "RowOps", hidden: Tensor, others: dict[str, Any]
) -> bool:
    """Whether a layer, fused, gives the same numbers; in float32, where no rounding hides it."""
    cosines, sines = others["position_embeddings"]
    if {cosines.dtype, sines.dtype} != {hidden.dtype}:
        return False
    layer, hidden = deepcopy(layer).float(), hidden.float()
    others = others | {"position_embeddings": (cosines.float(), sines.float())}
    expected = layer(hidden, **others)
    result = FusedLayer(layer, index, ops)(hidden, **others)
    return _is_near(result, expected, hidden)


def _run(
    model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor
) -> dict[int, tuple[Tensor, dict[str, Any]]]:
    """What each layer is given for a few tokens: rows, and all else by name."""
    seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def note(index: int) -> Any:
        def noting(_: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
            if len(args) == 1:
                seen[index] = (args[0].clone(), others)

        return noting

    handles = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        # Up to the farthest, as attention may depend on where a token stands.
        positions = torch.linspace(0, max_context(model.config) - 1, len(tokens)).long()
        hook.forward(model, tokens, positions, torch.tensor([0]), hook.PlainAttention())
    finally:
        for handle in handles:
            handle.remove()
    return seen
