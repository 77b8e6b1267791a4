"""Finding and loading a model, its tokenizer, and what the engine needs to know of both."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tokendance.attention.interface import LayerKind
from tokendance.errors import ConfigError, ModelNotFoundError, TokenDanceError
from tokendance.models import demo, hook
from tokendance.models.fused import fuse_layers, join_layers
from tokendance.models.packing import pack_linear_layers
from tokendance.models.support import ModelShape, probe, refusal, why_unsupported
from tokendance.options import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that can be served."""

    name: str  # as the user gave it
    module: nn.Module  # the transformers model, with our attention
    tokenizer: Any  # its own
    shape: ModelShape
    layers: tuple[LayerKind, ...]  # the rotation and window of each layer
    dtype: torch.dtype  # of what it computes, and of the KV
    device: torch.device  # where it lies
    stop_ids: frozenset[int]  # tokens that end an answer
    weights: Weights = "native"  # how those of linear layers are kept

    @property
    def precision(self) -> str:
        """See `precision_name`."""
        return precision_name(self.dtype, self.weights)

    @property
    def salt_names(self) -> tuple[str, ...]:
        """What KV must agree in to be shared, for `make_salt`; stores on disk hold such salts."""
        names = (self.name, str(self.dtype))
        return names if self.weights == "native" else (*names, self.weights)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype's name into the dtype; "auto" takes bfloat16 where the machine computes it.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "auto":
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"There is no dtype {name!r}. Use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def choose_device(name: str) -> torch.device:
    """Turn a device's name into the device.

    Raises:
        ConfigError: if it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {name!r} cannot be used: {error}") from error
    return device


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as the command line does."""
    return str(dtype).removeprefix("torch.")


def precision_name(dtype: torch.dtype, weights: Weights) -> str:
    """Name what numbers depend on besides the model: bfloat16, or bfloat16-int8."""
    return dtype_name(dtype) + ("" if weights == "native" else f"-{weights}")


def checkpoint_source(name: str) -> str:
    """What transformers loads for a name: an alias becomes its folder, converted if need be."""
    return str(demo.checkpoint(name)) if name in demo.MODELS else name


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", weights: Weights = "native"
) -> LoadedModel:
    """Load a model by alias, folder or hub id; see `choose_dtype` and `choose_device`.

    Raises:
        ConfigError: for a dtype that does not exist, or a device that cannot be used; for weights
            that cannot be kept so there.
        ModelNotFoundError: if there is none of that name, or its files are broken.
        UnsupportedModelError: if the arithmetic does not hold for it.
    """
    hook.register()
    target = choose_device(device)
    chosen = choose_dtype(dtype, target)
    with quiet(), readable_errors(name):
        source = checkpoint_source(name)
        config = AutoConfig.from_pretrained(source)
        reason = why_unsupported(config)
        if reason is not None:
            raise refusal(reason)
        tokenizer = AutoTokenizer.from_pretrained(source)
        module, report = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            dtype=chosen,
            attn_implementation=hook.ATTENTION_NAME,
            use_safetensors=True,  # the other format is pickle, which runs code
        )
        missing = [*report["missing_keys"], *report["mismatched_keys"]]
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them.")
    return prepare_model(name, module.to(target), tokenizer, chosen, target, weights)


def prepare_model(
    name: str,
    module: nn.Module,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    weights: Weights = "native",
) -> LoadedModel:
    """Make a model of transformers ready to be served.

    It is made with the attention `hook.ATTENTION_NAME`; its linear layers may be replaced.

    Raises:
        ConfigError: for weights that cannot be kept so there.
        UnsupportedModelError: if the arithmetic does not hold for it.
    """
    module.eval()
    shape, layers = probe(module, module.config)
    fuse_layers(module)
    pack_linear_layers(module, weights)
    join_layers(module)
    stop_ids = _stop_ids(module, tokenizer)
    return LoadedModel(name, module, tokenizer, shape, layers, dtype, device, stop_ids, weights)


def why_not_loadable(name: str) -> str | None:
    """Say why a model cannot be loaded, from its configuration alone; None if it seems fine."""
    if name in demo.MODELS:
        return demo.why_missing(name)
    try:
        with quiet(), readable_errors(name):
            return why_unsupported(AutoConfig.from_pretrained(name))
    except ModelNotFoundError as error:
        return str(error)


def _stop_ids(module: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the model's generation settings and its tokenizer."""
    tokens: list[Any] = []
    for source in (getattr(module, "generation_config", None), module.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        tokens += value if isinstance(value, list | tuple) else [value]
    return frozenset(int(token) for token in tokens if token is not None)


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong name or broken files into one sentence."""
    try:
        yield
    except TokenDanceError:
        raise
    except Exception as error:  # broken files raise what their parsers raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "The folder" if Path(name).is_dir() else "The model"
        raise ModelNotFoundError(
            f"{where} {name!r} cannot be loaded: {first_line} "
            f"Give {demo.ALIAS!r}, a folder with config.json, tokenizer and safetensors weights, "
            "or the id of a model on the Hugging Face hub; `tokendance models` lists those at hand."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of transformers off the screen while loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
