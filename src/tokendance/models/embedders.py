"""Vectors of texts: the mean of the served model's hidden states, or another model's own.

An embedder is used by one thread at a time, but for `encode`, which several may call.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from tokendance.errors import ConfigError
from tokendance.models.encoder import PromptEncoder
from tokendance.models.hook import LayerHook, attend_plainly, register
from tokendance.models.loader import LoadedModel, choose_dtype, quiet, readable_errors
from tokendance.rounds.prompts import Prompt

Vectors = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls", "last"]

# Of sentence-transformers: what may stand in modules.json, and how Pooling says what it does.
_MODULES = {"Transformer", "Pooling", "Normalize"}
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


class Embedder(Protocol):
    """Makes vectors of texts."""

    @property
    def name(self) -> str | None:
        """Name of the model; None for the one that is served."""
        ...

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the model expects around it.

        Raises:
            PromptError: if it cannot be read.
        """
        ...

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """Run texts through the model in one pass; float32 (len(texts), size), of length 1."""
        ...


class MeanEmbedder:
    """The mean of the last hidden states of the model that is served; see `Embedder`."""

    name: str | None = None

    def __init__(self, model: LoadedModel, encoder: PromptEncoder) -> None:
        self._model = model
        self._encoder = encoder
        self.max_tokens = model.shape.max_context
        self.vocab_size = model.shape.vocab_size

    @property
    def size(self) -> int:
        """Size of the hidden states."""
        return int(self._model.module.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def encode(self, text: str) -> list[int]:
        """See `Embedder`."""
        return [int(token) for token in self._encoder.encode(Prompt(text)).token_ids]

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """See `Embedder`; the texts lie side by side in one row, and do not see each other."""
        device = self._model.device
        # Those of a length are neighbours, and are computed by the same calls.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        groups = [
            _Group(length, len(list(same)))
            for length, same in groupby(len(texts[index]) for index in order)
        ]
        tokens = torch.tensor([token for i in order for token in texts[i]], device=device)
        positions = torch.cat([torch.arange(g.length, device=device).repeat(g.num) for g in groups])
        with torch.inference_mode():
            # The same module also runs in the engine's thread: it keeps nothing of a call.
            states = self._model.module.base_model(  # type: ignore[operator]
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                tokendance=_SideBySide(self._model, groups),
            ).last_hidden_state[0]
            means = torch.cat([part.float().mean(1) for part in _parted(states, groups)])
        vectors = torch.empty_like(means)
        vectors[order] = means
        return _of_length_1(vectors)


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts of one length, in tokens, that lie next to each other."""

    length: int
    num: int


def _parted(rows: Tensor, groups: Sequence[_Group]) -> list[Tensor]:
    """Rows of all texts, (T, ...), as (num, length, ...) of each group."""
    parts = torch.split(rows, [group.num * group.length for group in groups])
    return [
        part.reshape(group.num, group.length, *part.shape[1:])
        for part, group in zip(parts, groups, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _SideBySide(LayerHook):
    """Attention of texts that lie in one row; see `hook.LayerHook`."""

    model: LoadedModel
    groups: Sequence[_Group]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        del extra  # what it says was found at load time
        window = self.model.layers[layer].window
        queries, keys, values = (_parted(heads, self.groups) for heads in (query, key, value))
        parts = [
            attend_plainly(*heads, scale, window).flatten(0, 1)
            for heads in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(parts)


class OwnEmbedder:
    """A model of its own, and what its folder says of pooling; see `Embedder`."""

    def __init__(self, name: str, dtype: str = "auto", device: torch.device | str = "cpu") -> None:
        """Load it.

        Raises:
            ConfigError: if its vectors are made in a way that is not known here.
            ModelNotFoundError: if there is none of that name, or its files are broken.
        """
        register()
        self._device = torch.device(device)
        with quiet(), readable_errors(name):
            config = AutoConfig.from_pretrained(name)
            self._pooling = _pooling(name, config)
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(
                name, dtype=choose_dtype(dtype, self._device), use_safetensors=True
            )
        self._model.eval().to(self._device)
        self.name = name
        self.size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        lengths = (config.max_position_embeddings, self._tokenizer.model_max_length)
        self.max_tokens = int(min(lengths))

    def encode(self, text: str) -> list[int]:
        """See `Embedder`."""
        return [int(token) for token in self._tokenizer(text, verbose=False).input_ids]

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """See `Embedder`."""
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        longest = int(lengths.max())
        padded = [[*text, *([0] * (longest - len(text)))] for text in texts]
        mask = torch.arange(longest, device=self._device) < lengths[:, None]
        with torch.inference_mode():
            states = self._model(
                input_ids=torch.tensor(padded, device=self._device), attention_mask=mask.long()
            ).last_hidden_state.float()
            match self._pooling:
                case "mean":
                    states = states.masked_fill(~mask[..., None], 0)
                    vectors = states.sum(1) / lengths[:, None]
                case "cls":
                    vectors = states[:, 0]
                case "last":
                    vectors = states[torch.arange(len(texts), device=self._device), lengths - 1]
        return _of_length_1(vectors)


def _pooling(name: str, config: Any) -> Pooling:
    """How a model's folder says that a vector is made of hidden states; the mean if it does not."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name!r} has an encoder and a decoder, and no one vector for a text.")
    modules = _read(name, "modules.json") or []
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind not in _MODULES:
            raise ConfigError(f"Vectors of {name!r} go through {kind!r}, which is not known here.")
    folder = next((one["path"] for one in modules if str(one["type"]).endswith("Pooling")), None)
    wanted = (_read(name, f"{folder}/config.json") if folder else None) or {}
    modes = [mode for mode, value in wanted.items() if mode.startswith("pooling_mode_") and value]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ConfigError(f"Vectors of {name!r} are made by {', '.join(modes)}, not known here.")
    return _POOLINGS[modes[0]]


def _read(name: str, file: str) -> Any:
    """A JSON file of a model's folder; None if there is none."""
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _of_length_1(vectors: Tensor) -> Vectors:
    normal: Vectors = functional.normalize(vectors, dim=1).cpu().numpy()
    return normal
