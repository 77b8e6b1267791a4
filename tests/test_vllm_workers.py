"""The worker side inside the real vLLM: both model runners, several devices, drafts, adapters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from test_vllm import FINISH, NUM_AGENTS, PYTHON, ROUND, run_in_vllm, tokens
from tiny_models import save_model
from tokendance import LLM, SamplingParams
from tokendance.bench.vllm import VLLMConfig, child_environment
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from vllm_server import CORRECTION, SCENARIOS, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
V2: dict[str, Any] = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
SCENARIO = {"round": [ROUND.add(), FINISH]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # Heads of 32, and layers and heads that two devices can share.
    save_model(folder, "llama", hidden_size=128, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def embedded(model: Path) -> list[list[int]]:
    """What the embedded engine answers."""
    options = EngineOptions(kv_budget=2**24, correction=CORRECTION)
    llm = LLM.from_loaded(load_model(str(model), "float32"), options)
    result = llm.run_round(ROUND.prompts(), SamplingParams(max_tokens=8, ignore_eos=True))
    return [list(output.token_ids) for output in result.outputs]


def check_round(result: Mapping[str, Any], embedded: list[list[int]]) -> None:
    """Assert that a round was computed collectively, and all answers are as they should be."""
    assert tokens(result) == embedded
    assert result["missing_blocks"] == 0
    cached = [result["answers"][str(index)]["num_cached"] for index in range(NUM_AGENTS)]
    assert cached == [0, *[len(ROUND.shared) - 4] * (NUM_AGENTS - 1)]


@pytest.mark.parametrize(
    "engine",
    [
        {"async_scheduling": False},
        {"max_num_batched_tokens": 48, "async_scheduling": True},
    ],
    ids=["whole", "in chunks, asynchronous"],
)
def test_the_v2_runner(engine: Mapping[str, Any], model: Path, embedded: list[list[int]]) -> None:
    results = run_in_vllm(model, SCENARIO, engine={"max_num_seqs": 8, **engine}, **V2)
    check_round(results["round"], embedded)
    assert results["runner"] == "vllm.v1.worker.cpu.model_runner"
    # On a CPU vLLM schedules synchronously whatever is asked.
    assert results["scheduler"] in ("AsyncRoundScheduler", "RoundScheduler")


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel_size": 2},
        # vLLM itself does not run two stages of a CPU that have nothing compiled.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 2,
                "prompt_lookup_min": 1,
            }
        },
    ],
    ids=["two devices a layer", "two stages", "drafts"],
)
def test_the_v1_runner(engine: Mapping[str, Any], model: Path, embedded: list[list[int]]) -> None:
    check_round(run_in_vllm(model, SCENARIO, engine=engine)["round"], embedded)


@pytest.mark.parametrize("environment", [{}, V2], ids=["V1", "V2"])
def test_without_the_shift_vllm_refuses_to_start(environment: dict[str, Any], model: Path) -> None:
    """The check at the start sees what would give wrong answers."""
    with pytest.raises(AssertionError, match="check at the start failed"):
        run_in_vllm(model, SCENARIO, TEST_WITHOUT_SHIFT="1", **environment)


@pytest.mark.parametrize("environment", [{}, V2], ids=["V1", "V2"])
def test_without_the_shift_the_answers_are_others(
    environment: dict[str, Any], model: Path, embedded: list[list[int]]
) -> None:
    """A control: the comparison can fail."""
    result = run_in_vllm(
        model, SCENARIO, TEST_WITHOUT_SHIFT="1", TEST_WITHOUT_CHECK="1", **environment
    )
    assert tokens(result["round"]) != embedded


def test_a_rank_that_refuses_ends_all(model: Path) -> None:
    with pytest.raises(AssertionError, match="check at the start failed"):
        run_in_vllm(model, SCENARIO, engine={"tensor_parallel_size": 2}, TEST_WITHOUT_SHIFT="1")


def save_adapter(folder: Path, seed: int) -> str:
    """Write a random LoRA adapter of the model's queries and values."""
    torch.manual_seed(seed)
    shapes = {"q_proj": (128, 128), "v_proj": (128, 64)}  # tokens come in, heads come out
    weights = {}
    for layer in range(4):
        for name, (size_in, size_out) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(8, size_in) / 4
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size_out, 8) / 4
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [*shapes]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return str(folder)


def test_adapters_are_tenants(model: Path, embedded: list[list[int]], tmp_path: Path) -> None:
    """Two rounds of the same text at once: each adapter's agents read their own owner's KV."""
    rounds = {
        prefix: ROUND.add(prefix, adapter=name, path=save_adapter(tmp_path / name, seed))
        for seed, (prefix, name) in enumerate({"a": "adapter1", "b": "adapter2"}.items())
    }
    both = {"add": [*rounds["a"]["add"], *rounds["b"]["add"]]}
    results = run_in_vllm(
        model,
        {
            "a": [rounds["a"], FINISH],
            "b": [rounds["b"], FINISH],
            "both": [both, FINISH],
            "without": [ROUND.add(), FINISH],
        },
        engine={"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
    )
    for prefix in rounds:
        assert tokens(results["both"], prefix) == tokens(results[prefix], prefix)
        answers = results["both"]["answers"]
        cached = [answers[f"{prefix}{index}"]["num_cached"] for index in range(NUM_AGENTS)]
        assert cached == [0, *[len(ROUND.shared) - 4] * (NUM_AGENTS - 1)]
    assert tokens(results["a"], "a") != tokens(results["b"], "b")
    assert tokens(results["without"]) == embedded != tokens(results["a"], "a")
    assert results["both"]["missing_blocks"] == 0


def test_the_kernel_computes_on_the_threads_that_torch_has() -> None:
    """Also where vLLM's advice is followed, and another OpenMP runtime is preloaded."""
    assert PYTHON is not None
    environment = child_environment(PYTHON, VLLMConfig(threads=3))
    if "libiomp5" not in environment.get("LD_PRELOAD", ""):
        pytest.skip("Intel's OpenMP is not beside vLLM")
    printed = run([PYTHON, "-P", SCENARIOS / "threads.py"], "", environment)
    of_torch, more = map(int, printed.split())
    assert of_torch >= 2
    assert more == 0
