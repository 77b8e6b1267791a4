"""The plug-in on NVIDIA GPUs, without one: Triton's interpreter, stand-ins for what is missing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import is_thorough
from test_vllm import PYTHON, ROUND, run_in_vllm
from test_vllm_workers import SCENARIO, V2, check_round
from tiny_models import save_model
from tokendance import LLM, SamplingParams
from tokendance.bench.vllm import VLLMConfig, child_environment
from tokendance.integrations.vllm import CUDA_WORKER, SCHEDULER
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from vllm_server import CORRECTION, SCENARIOS, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
# Of the largest number of a row. In 16 bits a query is rounded again when it is turned.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def ask(script: str, job: Any, **environment: str) -> Any:
    assert PYTHON is not None
    variables = child_environment(PYTHON, VLLMConfig(threads=1)) | {"TRITON_INTERPRET": "1"}
    printed = run(
        [PYTHON, "-P", SCENARIOS / script], json.dumps(job) + "\n", variables | environment
    )
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(
    ("layout", "page_size", "heads", "dtype"),
    [
        ("LBNHC", 16, (2, 3, 32), "float32"),  # NHD: slots have one stride
        ("LBHNC", 16, (2, 3, 32), "float32"),  # HND: they have one within a page
        ("BLNHC", 32, (3, 3, 64), "bfloat16"),  # layers side by side in a block
        ("LHBNC", 32, (1, 4, 64), "float16"),
        ("BHLNC", 16, (1, 7, 128), "bfloat16"),
    ],
    ids=lambda value: str(value),
)
def test_steps_with_mirrors_are_read_in_place_and_others_are_vllms(
    layout: str, page_size: int, heads: Sequence[int], dtype: str
) -> None:
    """Random rounds, in chunks and with decoding requests, some of which read several owners."""
    job = {"layout": layout, "page_size": page_size, "heads": heads, "dtype": dtype}
    steps = ask("cuda_attention.py", job | {"seeds": list(range(8 if is_thorough() else 1))})
    kinds = set()
    for found in steps:
        has_mirror = any(name.startswith("mirror") for name in found["counts"])
        kinds.add((has_mirror, max(found["counts"].values()) > 1))
        assert found["is_output"]
        if has_mirror:
            assert not found["untouched"]
            assert found["padding_kept"], "rows that only fill a graph were written"
            assert found["error"] < TOLERANCE[dtype], found
        else:
            assert found["untouched"], "FlashAttention was called with something else"
            assert found["kind"] == "FlashAttentionMetadata"
    assert len(kinds) == 4, "steps of each kind, of single tokens and of more"


def test_a_round_inside_vllm_attends_by_the_backend_of_gpus(tmp_path: Path) -> None:
    """The V2 runner's own steps, over its own pages; FlashAttention is plain torch here."""
    save_model(tmp_path, "llama", hidden_size=128, num_hidden_layers=2)
    options = EngineOptions(kv_budget=2**24, correction=CORRECTION)
    llm = LLM.from_loaded(load_model(str(tmp_path), "float32"), options)
    result = llm.run_round(ROUND.prompts(), SamplingParams(max_tokens=8, ignore_eos=True))
    results = run_in_vllm(
        tmp_path,
        SCENARIO,
        engine={"max_num_seqs": 8, "max_num_batched_tokens": 48, "async_scheduling": True},
        TEST_CUDA_ATTENTION="1",
        **V2,
    )
    check_round(results["round"], [list(output.token_ids) for output in result.outputs])
    attended = results["attended"]
    assert attended.keys() == {"FlashAttentionMetadata", "ours"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "llama", hidden_size=128)  # heads of 32
    return folder


SERVED: list[dict[str, Any]] = [
    {},
    {"attention_backend": "FLASH_ATTN", "dtype": "float16"},
    {"compilation_config": {"cudagraph_mode": "FULL"}},
    {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    {"enforce_eager": True},
    {"kv_cache_memory_bytes": 2**30},
]
REFUSED: dict[str, dict[str, Any]] = {
    "another attention backend than FLASH_ATTN": {"engine": {"attention_backend": "FLASHINFER"}},
    "another attention backend than": {"engine": {"attention_backend": "CUSTOM"}},  # not ours
    "KV has a dtype of its own": {"engine": {"kv_cache_dtype": "fp8"}},
    "no kernel for heads of 80": {"engine": {"hf_overrides": {"head_dim": 80}}},
    "in torch.float32": {"engine": {"dtype": "float32"}},
    "attention windows": {"engine": {"hf_overrides": {"sliding_window": 64}}},
    "another worker": {"engine": {"worker_cls": "somebody.Worker"}},
    "capability is below 8.0": {"engine": {"dtype": "float16"}, "capability": 75},
    "FlashInfer here": {"capability": 100},
    "VLLM_BATCH_INVARIANT": {"environment": {"VLLM_BATCH_INVARIANT": "1"}},
    "the V1 model runner": {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
}


def choices(model: Path, jobs: Iterable[Mapping[str, Any]]) -> Any:
    """What is chosen on an H100 for a tiny model, if a job does not say otherwise."""
    default = {"model": str(model), "capability": 90, "engine": {}, "environment": {}}
    return ask("cuda_configurations.py", [{**default, **job} for job in jobs], TOKENDANCE="1")


def test_one_variable_is_all(model: Path) -> None:
    """Served, and what vLLM has by default stays on."""
    answers = choices(model, [{"engine": engine} for engine in SERVED])
    for engine, found in zip(SERVED, answers, strict=True):
        assert (found["worker"], found["scheduler"]) == (CUDA_WORKER, SCHEDULER), found["said"]
        assert found["is_ours"], "vLLM attends by another backend"
        assert found["prefix_caching"]
        assert found["chunked_prefill"]
        assert found["asynchronous"]
        # KV has less: for each row 4 results of 4 heads of 32, in float32.
        taken = 0 if "kv_cache_memory_bytes" in engine else 4 * 4 * 4 * 33 * found["max_tokens"]
        assert found["memory"] == 2**33 - taken
        # Of pieces, between attention; where nothing is compiled there are none.
        assert found["graphs_of_attention"] == "NEVER"
        is_eager = engine.get("enforce_eager", False)
        assert found["graphs"] == ("NONE" if is_eager else "PIECEWISE")
        assert found["splits_at_attention"] != is_eager
        assert found["compiles"] == ("NONE" if is_eager else "VLLM_COMPILE")
        assert bool(found["said"]) != is_eager, "that there are no graphs of whole steps is said"


def test_what_does_not_fit_runs_as_plain_vllm_and_is_said(model: Path) -> None:
    for why, found in zip(REFUSED, choices(model, REFUSED.values()), strict=True):
        assert found["scheduler"] is None, why
        assert found["worker"] != CUDA_WORKER
        (said,) = found["said"]
        assert why in said
