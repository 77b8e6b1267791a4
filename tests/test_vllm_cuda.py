"""The plug-in on NVIDIA GPUs, without one: Triton's interpreter, and notes of vLLM's calls."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from test_vllm import PYTHON
from tokendance.bench.vllm import VLLMConfig, child_environment
from tokendance.integrations.vllm import CUDA_ATTENTION, CUDA_WORKER, SCHEDULER

SCRIPT = Path(__file__).parent / "vllm_scenarios" / "cuda_attention.py"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
PLAIN = ("owners, and nobody reads", "plain, in chunks", "plain again")
SHARED = ("mirrors, in chunks, and others", "mirrors alone", "decoding, all")
# Of the largest number of a row. In 16 bits a query is rounded again when it is turned.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def run(job: dict[str, Any], **environment: str) -> Any:
    assert PYTHON is not None
    variables = child_environment(PYTHON, VLLMConfig(threads=1)) | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [PYTHON, "-P", SCRIPT],
        input=json.dumps(job) + "\n",
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("layout", "page_size", "heads", "dtype"),
    [
        ("LBNHC", 16, (2, 3, 32), "float32"),  # NHD: slots have one stride
        ("LBHNC", 16, (2, 3, 32), "float32"),  # HND: they have one within a page
        ("BLNHC", 32, (3, 3, 64), "bfloat16"),  # layers side by side in a block
        ("LHBNC", 32, (1, 4, 64), "float16"),
        ("BHLNC", 16, (2, 7, 128), "bfloat16"),
    ],
    ids=lambda value: str(value),
)
def test_steps_with_mirrors_are_read_in_place_and_others_are_vllms(
    layout: str, page_size: int, heads: tuple[int, int, int], dtype: str
) -> None:
    job = {
        "seed": page_size,
        "layout": layout,
        "page_size": page_size,
        "heads": heads,
        "dtype": dtype,
    }
    answer = run(job)
    assert answer["graphs"] == "NEVER"  # of whole steps
    for name in PLAIN:
        step = answer[name]
        assert step["untouched"], name
        assert step["kind"] == "FlashAttentionMetadata"
        assert step["built"] == [True]
    for name in SHARED:
        step = answer[name]
        assert not step["untouched"], name
        assert step["is_output"]
        assert step["padding_kept"], "rows that only fill a graph were written"
        assert step["error"] < TOLERANCE[dtype], name


def test_one_variable_is_all() -> None:
    served: list[dict[str, Any]] = [
        {},
        {"backend": "FLASH_ATTN", "dtype": "float16", "head_size": 64},
    ]
    refused: list[dict[str, Any]] = [
        {"backend": "FLASHINFER"},
        {"cache_dtype": "fp8"},
        {"head_size": 80},
        {"dtype": "float32"},
        {"capability": 75},
        {"v2": False},
    ]
    chosen = run({"configurations": served + refused}, TOKENDANCE="1")
    ours = {"worker": CUDA_WORKER, "scheduler": SCHEDULER, "attention": CUDA_ATTENTION}
    assert chosen[: len(served)] == [ours] * len(served)
    for changes, plain in zip(refused, chosen[len(served) :], strict=True):
        assert (plain["worker"], plain["scheduler"]) == ("vLLM's", None), changes
        assert plain["attention"] != CUDA_ATTENTION, changes
