"""Serves vLLM over JSON lines, in vLLM's own environment.

    python -P vllm_worker.py < requests > replies

It is run as a script, by a Python that knows vLLM and not this package, so it imports nothing of
ours. `bench/vllm.py` starts it. Each request is one line, and so is its reply:

    {"op": "start", "engine": {...}}             {"version": "0.32.0"}
    {"op": "run", "prompts": [[1, 2], ...],      {"seconds": 1.5, "token_ids": [[3], ...],
     "max_tokens": 1}                             "cached_tokens": [0, ...]}
    {"op": "reset"}                              {}

`engine` holds the arguments of `vllm.LLM`. What goes wrong is replied as {"error": "..."}, with the
traceback on stderr, and ends the process with status 1. The end of stdin ends it too.
"""

import importlib
import json
import os
import sys
import time
import traceback
from typing import IO, Any

# By its name, since type checkers do not find it in the environment that they run in.
vllm: Any = importlib.import_module("vllm")


def main() -> int:
    """Answer requests until the end of stdin, and return the exit status."""
    llm: Any = None
    with _take_stdout() as replies:
        for line in sys.stdin:
            try:
                request = json.loads(line)
                if request["op"] == "start":
                    # With its statistics, as vLLM's server runs.
                    llm = vllm.LLM(**request["engine"], disable_log_stats=False)
                    reply = {"version": vllm.__version__}
                else:
                    reply = _answer(llm, request)
            except Exception as error:
                traceback.print_exc()
                _send(replies, {"error": f"{type(error).__name__}: {error}"})
                return 1
            _send(replies, reply)
    return 0


def _answer(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request; it must come after `start`."""
    match request["op"]:
        case "run":
            return _run(llm, request["prompts"], request["max_tokens"])
        case "reset":
            if not llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache")
            return {}
        case operation:
            raise ValueError(f"there is no operation {operation!r}")


def _run(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Answer all prompts together, greedily, with exactly `max_tokens` tokens each."""
    # Nobody reads the text, so vLLM is spared making it.
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - start,
        "cached_tokens": [output.num_cached_tokens for output in outputs],
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
    }


def _take_stdout() -> IO[str]:
    """Keep stdout for replies; whatever else prints there goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
