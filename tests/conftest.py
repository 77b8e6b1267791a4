"""Tiny random models with a byte-like tokenizer, made once per test run; how much is tried."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 runs its tests on a GPU
if folder := os.environ.get("TOKENDANCE_NATIVE"):
    # Another build of the native kernel (make sanitize).
    (library,) = Path(folder).glob("_native*.so")
    loader = ExtensionFileLoader("tokendance.attention._native", str(library))
    spec = importlib.util.spec_from_file_location(loader.name, library, loader=loader)
    assert spec is not None
    sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[loader.name])

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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

from fake_executor import FakeExecutor, next_token
from tokendance import LLM
from tokendance.bench.workload import RoundWorkload
from tokendance.executor.step import Executor
from tokendance.models import hook
from tokendance.models.loader import LoadedModel, load_model
from tokendance.models.support import ModelShape
from tokendance.options import EngineOptions, ReuseMode

# How many random examples are tried: all of them, or a quarter while somebody waits (make test).
# How long one takes says nothing on a machine that does something else, too.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("developer", settings.get_profile("ci"), max_examples=25)
settings.load_profile("ci")  # `--hypothesis-profile` comes after it


def is_thorough() -> bool:
    """Whether everything is tried at its full size, as CI does."""
    return settings.get_current_profile_name() == "ci"


def examples(count: int) -> int:
    """So many random examples where everything is tried, and a quarter of them elsewhere."""
    return count if is_thorough() else max(1, count // 4)


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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the demo models run in one process, which loads the weights once."""
    for item in items:
        if item.get_closest_marker("demo") is not None:
            item.add_marker(pytest.mark.xdist_group("demo"))


def num_threads() -> int:
    """Threads for a larger model: the cores, divided among the processes that run tests."""
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, (os.cpu_count() or 1) // num_processes)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny models gain nothing from threads, which wait for each other while others work."""
    is_demo = request.node.get_closest_marker("demo") is not None
    torch.set_num_threads(num_threads() if is_demo else 1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny model of an architecture and returns its folder."""
    folders: dict[str, Path] = {}

    def make(architecture: str, **changes: object) -> Path:
        key = architecture + repr(sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            save_model(folders[key], architecture, **changes)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama")), "float32")


@pytest.fixture(scope="session")
def fake() -> LoadedModel:
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


@pytest.fixture
def make_fake_llm(fake: LoadedModel, make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """Return a function that puts an engine around a `FakeExecutor`, which says no special token.

    Its steps take no time, and what it answers follows from the tokens it reads: see `said`.
    """

    def make(**settings: Any) -> LLM:
        num_slots = settings.get("num_pages", 400) * settings.get("page_size", 16)
        return make_llm(model=fake, executor=FakeExecutor(num_slots, VOCAB, SPECIALS), **settings)

    return make


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


@pytest.fixture
def make_llm(tiny: LoadedModel) -> Iterator[Callable[..., LLM]]:
    """Return a function that puts an engine around the tiny model; checks its books at the end."""
    made: list[LLM] = []

    def make(
        reuse: ReuseMode = "collective",
        correction: str = "first:4",
        max_num_batched_tokens: int = 4096,
        num_pages: int = 400,
        page_size: int = 16,
        max_reuse_rounds: int = 16,
        model: LoadedModel = tiny,
        executor: Executor | None = None,
        **others: Any,
    ) -> LLM:
        page_bytes = model.shape.kv_bytes_per_token(model.dtype) * page_size
        options = EngineOptions(
            reuse=reuse,
            correction=correction if reuse == "collective" else None,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_budget=num_pages * page_bytes,
            page_size=page_size,
            max_reuse_rounds=max_reuse_rounds,
            **others,
        )
        made.append(LLM.from_loaded(model, options, executor=executor))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.check_integrity()
        assert not llm.engine.has_work
        llm.kv_store.clear()
        llm.engine.check_integrity()
        assert llm.kv_store.pool.num_free == llm.kv_store.pool.num_pages
