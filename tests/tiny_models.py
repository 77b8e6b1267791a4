"""Tiny models, tokenizers and prompts, and what has to come of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fake_executor import next_token
from tokendance import LLM
from tokendance.bench.workload import RoundWorkload
from tokendance.models import hook
from tokendance.models.loader import LoadedModel
from tokendance.models.support import ModelShape

VOCAB = 300
SPECIALS = 3
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
COMMON: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,  # heads of 16
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for answers that differ
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[type, type, dict[str, object]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    # Windows in all layers, in some, and in some with another rotation.
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 24,
            "sliding_window_pattern": 2,  # every second layer sees all
            "tie_word_embeddings": False,
        },
    ),
    # Two rotations that differ in their lowest frequencies only.
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {
            "hidden_size": 256,  # heads of 64
            "num_hidden_layers": 4,
            "max_position_embeddings": 65536,
            "sliding_window": 24,
            "rope_theta": 500000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "attention_factor": 1.2,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<|start|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers itself answers, by its own attention."""
    answer = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = answer[0, len(prompt) :].tolist()
    return tokens


def save_model(folder: Path, architecture: str, **changes: object) -> None:
    """Write a tiny random model of an architecture, always the same, and its tokenizer."""
    config_class, model_class, extra = MODELS[architecture]
    torch.manual_seed(7)
    model = model_class(config_class(**{**COMMON, **extra, **changes}))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def fake_model() -> LoadedModel:
    """A tokenizer and a shape, and no model: for a `FakeExecutor`."""
    hook.register()
    shape = ModelShape(1, 1, 1, 1, VOCAB, max_context=4096)
    return LoadedModel(
        "fake",
        nn.Identity(),
        make_tokenizer(),
        shape,
        (),
        torch.float32,
        torch.device("cpu"),
        frozenset({2}),
    )


def said(prompt: Sequence[int], count: int) -> list[int]:
    """What a `FakeExecutor` answers."""
    answer: list[int] = []
    while len(answer) < count:
        answer.append(next_token([*prompt, *answer], VOCAB, SPECIALS))
    return answer


def formula(workload: RoundWorkload, llm: LLM, k: int) -> int:
    """Tokens that a round should compute, private parts cached: S + t + (N - 1)(k B + t).

    All agents read all blocks in one order. S and t are counted on a prompt; the template's text
    after the task belongs to the task.
    """
    num_shared = num_task = 0
    for prompt in workload.encoded(llm):
        num_shared = sum(len(segment) for _, segment in prompt.shared_segments())
        num_task += len(prompt.segments[-1])
    mirrors = len(workload.views) - 1
    return num_shared + num_task + mirrors * k * len(workload.blocks)
