"""Models with random weights and rounds of random token ids: for time and memory, not for words."""

import copy
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from tokendance.bench.arms import prompts_around
from tokendance.bench.workload import WorkloadSpec
from tokendance.models import hook
from tokendance.models.loader import LoadedModel, prepare_model
from tokendance.rounds.prompts import Prompt, private, shared

QWEN25_7B: dict[str, Any] = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def random_module(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> nn.Module:
    """Make a Qwen2 model with random weights where it will run.

    Args:
        shape: names and values of its configuration.
        dtype: of the weights.
        device: on which they are drawn.
        seed: the same gives the same weights on a device of one kind.
    """
    hook.register()
    torch.manual_seed(seed)
    with device:
        module: nn.Module = AutoModelForCausalLM.from_config(
            Qwen2Config(**shape), dtype=dtype, attn_implementation=hook.ATTENTION_NAME
        )
    return module


def as_model(module: nn.Module, device: torch.device) -> LoadedModel:
    """Copy a model to a device, if it is elsewhere, with a tokenizer that knows no word."""
    weight = next(module.parameters())
    if weight.device.type != device.type:
        module = copy.deepcopy(module).to(device)
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    return prepare_model("random weights", module, tokenizer, weight.dtype, device)


def random_round(spec: WorkloadSpec, task_tokens: int, vocab_size: int) -> list[Prompt]:
    """Prompts of the lengths that `bench.workload` writes: private part, blocks, one task for all.

    Args:
        spec: its source, order and overlap are not used.
        task_tokens: 22 have the tasks there, with the template's text.
        vocab_size: ids are from 0 up to this.
    """
    rng = np.random.default_rng(spec.seed)

    def draw(count: int) -> list[int]:
        ids: list[int] = rng.integers(vocab_size, size=count).tolist()
        return ids

    lengths = np.linspace(*spec.private_tokens, spec.agents).astype(int)
    blocks = [shared(draw(spec.block_tokens)) for _ in range(spec.agents)]
    task = private(draw(task_tokens))
    return [
        Prompt([private(draw(int(length))), *blocks, task], agent=f"agent {index}")
        for index, length in enumerate(rng.permutation(lengths))
    ]


def random_prompts_around(
    agents: int, num_shared: int, num_own: int, vocab_size: int
) -> list[Prompt]:
    """Prompts as in the suite `decode`: a shared run with own tokens around it.

    Args:
        agents: one prompt each.
        num_shared: tokens that all read.
        num_own: tokens that one agent has.
        vocab_size: ids are from 0 up to this.
    """
    rng = np.random.default_rng(0)
    run = rng.integers(vocab_size, size=num_shared).tolist()
    own = rng.integers(vocab_size, size=(agents, num_own)).tolist()
    return prompts_around(run, own)


def matmul_weights(model: LoadedModel) -> int:
    """Weights of a Qwen2 model's layers by which each token is multiplied, without biases."""
    config: Any = model.module.config
    shape, hidden, between = model.shape, int(config.hidden_size), int(config.intermediate_size)
    heads = 2 * hidden * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (heads + 3 * hidden * between)
