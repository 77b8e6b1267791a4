"""`vllm bench serve` as a client: what it sends is answered, and it can read the answers."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serving import serving
from tokendance import LLM
from tokendance.bench.vllm import VLLM_ENVIRONMENT
from tokendance.models import demo
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions

PATHS = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
}
NUM_PROMPTS, NUM_TOKENS = 4, 8
# What its options for sampling put into every body.
SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.0,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.0,
}
# What `vllm bench serve` does. That command asks for the version of a package named `vllm`, which
# the build for CPUs is not.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("prompt", ["hello there", [5, 6, 7, 8]], ids=["text", "token-ids"])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_its_completions_are_answered(
    make_llm: Any, prompt: str | list[int], logprobs: int | None
) -> None:
    """As `async_request_openai_completions` writes them."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": NUM_TOKENS,
        "logprobs": logprobs,
        **STREAMED,
        "ignore_eos": True,
        **SAMPLING,
    }
    with serving(make_llm()) as (http, _):
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "bench-0"})
    assert answer.status_code == 200, answer.text
    assert f'"completion_tokens": {NUM_TOKENS}' in answer.text


def test_its_chats_are_answered(make_llm: Any) -> None:
    """As `async_request_openai_chat_completions` writes them."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}],
        "max_completion_tokens": NUM_TOKENS,
        **STREAMED,
        "ignore_eos": True,
        **SAMPLING,
    }
    with serving(make_llm()) as (http, _):
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert f'"completion_tokens": {NUM_TOKENS}' in answer.text


@pytest.mark.vllm
@pytest.mark.demo
@pytest.mark.skipif(VLLM_ENVIRONMENT.find() is None, reason="vLLM is not installed (make vllm)")
@pytest.mark.parametrize("backend", PATHS)
def test_it_measures_the_server(backend: str, tmp_path: Path) -> None:
    python = VLLM_ENVIRONMENT.find()
    assert python is not None
    options = {
        "backend": backend,
        "endpoint": PATHS[backend],
        "model": demo.ALIAS,
        "tokenizer": demo.checkpoint(),
        "dataset-name": "random",
        "random-input-len": 64,
        "random-output-len": NUM_TOKENS,
        "num-prompts": NUM_PROMPTS,
        "result-dir": tmp_path,
        "result-filename": "result.json",
    }
    options |= {name.replace("_", "-"): value for name, value in SAMPLING.items()}
    llm = LLM.from_loaded(load_model(demo.ALIAS), EngineOptions(kv_budget=2**29))
    with serving(llm, served_name=demo.ALIAS) as (http, _):
        options["base-url"] = str(http.base_url).rstrip("/")
        ended = subprocess.run(
            [
                *(python, "-c", BENCH, "--save-result", "--ignore-eos"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env={name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
            | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == NUM_PROMPTS, ended.stdout
    assert result["total_output_tokens"] == NUM_PROMPTS * NUM_TOKENS
