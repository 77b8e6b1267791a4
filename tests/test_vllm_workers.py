"""The worker side inside the real vLLM: both model runners, several devices, drafts, adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from test_vllm import FINISH, NUM_AGENTS, PYTHON, ROUND, run_in_vllm, tokens
from tiny_models import save_model
from tokendance import LLM, SamplingParams
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions

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
    llm = LLM.from_loaded(load_model(str(model), "float32"), EngineOptions(kv_budget=2**24))
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
        {},
        {"max_num_batched_tokens": 48, "async_scheduling": True},
    ],
    ids=["whole", "in chunks, asynchronous"],
)
def test_the_v2_runner(engine: Mapping[str, Any], model: Path, embedded: list[list[int]]) -> None:
    results = run_in_vllm(model, SCENARIO, engine={"max_num_seqs": 8, **engine}, **V2)
    check_round(results["round"], embedded)
    assert results["runner"] == "vllm.v1.worker.cpu.model_runner"


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
