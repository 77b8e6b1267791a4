"""Rows that leave a model in the middle: only some go on from one layer to the next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def rows_dropped(
    model: nn.Module, layer: int, num_rows: int, kept_rows: Callable[[], Tensor]
) -> Iterator[None]:
    """Within this context, only some rows go on from the attention of a decoder layer.

    In that layer itself, what comes after attention is computed for these rows and is zero for
    the others; the next layer drops them.

    Args:
        model: a causal language model whose decoder layers are `base_model.layers`.
        layer: index of the layer; not the last.
        num_rows: that there are up to it.
        kept_rows: called once that layer has attended; int64 (R,), the rows that go on.
    """
    layers: list[Any] = list(model.base_model.layers)  # type: ignore[union-attr, arg-type]

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (args[0][:, kept_rows()], *args[1:])

    def widen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        del module, args
        whole = output.new_zeros(1, num_rows, output.shape[-1])
        whole[:, kept_rows()] = output
        return whole

    def drop(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *others = args
        rows = kept_rows()
        if module is layers[layer + 1]:
            hidden = hidden[:, rows]
        # Layers of one kind are given the same tables.
        tables = kwargs["position_embeddings"]
        if id(tables) not in narrowed:
            narrowed[id(tables)] = (tables, tuple(table[:, rows] for table in tables))
        turned: dict[str, Any] = {"position_embeddings": narrowed[id(tables)][1]}
        if kwargs.get("position_ids") is not None:
            turned["position_ids"] = kwargs["position_ids"][:, rows]
        return (hidden, *others), kwargs | turned

    narrowed: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}  # by id of what is kept with it
    handles = []
    # Models that name these otherwise compute zeros in vain, and nothing else.
    output = getattr(layers[layer].self_attn, "o_proj", None)
    for module in (output, getattr(layers[layer], "mlp", None)):
        if module is not None:
            handles.append(module.register_forward_pre_hook(narrow))
            handles.append(module.register_forward_hook(widen))
    handles += [
        later.register_forward_pre_hook(drop, with_kwargs=True) for later in layers[layer + 1 :]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
