"""Scenarios inside vLLM: run by its own Python, told what to do by a JSON line, answering by one.

    {"model": FOLDER, "engine": {...}, "scenarios": {NAME: [STEP, ...]}}

A step is one of

    {"add": [{"id": ..., "tokens": [...], "max_tokens": ..., "extra": {...}, ...}]}
    {"steps": N}          engine steps
    {"abort": [ids]}
    {"finish": true}      steps until nothing is left

The answer has for each scenario the token ids of each request, and how many of its prompt tokens
came from a cache; then what is left of blocks when all that was kept is given up.
"""

import json
import os
import sys
import time
from typing import Any

sys.path.append(os.path.dirname(__file__))  # at the end: nothing in it hides a module of vLLM's
import stand_ins

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    stand_ins.triton_driver()

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


class Runner:
    """An engine and what its requests have answered."""

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        self.llm = LLM(model=model, **engine)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.answers: dict[str, dict[str, Any]] = {}
        self.num_preempted = 0
        self.peak_blocks = 0

    def run(self, script: list[dict[str, Any]]) -> dict[str, Any]:
        self.answers, self.num_preempted, self.peak_blocks = {}, 0, 0
        self.llm.reset_prefix_cache()
        for step in script:
            for request in step.get("add", ()):
                self._add(request)
            if "abort" in step:
                self.engine.abort_request(step["abort"], internal=False)
            for _ in range(step.get("steps", 0)):
                self._step()
            if step.get("finish"):
                deadline = time.monotonic() + 120
                while self.engine.has_unfinished_requests():
                    assert time.monotonic() < deadline, "somebody waits for ever"
                    self._step()
        self._step()  # lets go of what was aborted last
        rounds = getattr(self.scheduler, "_rounds", None)
        result = {
            "answers": self.answers,
            "preempted": self.num_preempted,
            "peak_blocks": self.peak_blocks,
        }
        if rounds is not None:
            rounds.check_integrity()
            rounds.forget()
        pool = self.scheduler.kv_cache_manager.block_pool
        result["missing_blocks"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return result

    def _add(self, request: dict[str, Any]) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=request.get("max_tokens", 8),
            ignore_eos=True,
            logprobs=request.get("logprobs"),
            extra_args=request.get("extra"),
        )
        prompt = TokensPrompt(prompt_token_ids=request["tokens"])
        if "salt" in request:
            prompt["cache_salt"] = request["salt"]
        adapter = request.get("adapter")
        self.engine.add_request(
            request["id"],
            prompt,
            params,
            lora_request=(
                LoRARequest(adapter, int(adapter[-1]), request["path"]) if adapter else None
            ),
            priority=request.get("priority", 0),
        )

    def _step(self) -> None:
        for output in self.engine.step():
            answer = output.outputs[0]
            self.answers[output.request_id] = {
                "tokens": list(answer.token_ids),
                "num_prompt": len(output.prompt_token_ids),
                "num_cached": output.num_cached_tokens,
                "logprobs": [
                    {token: entry.logprob for token, entry in entries.items()}
                    for entries in answer.logprobs or ()
                ],
            }
        pool = self.scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        self.peak_blocks = max(self.peak_blocks, used)
        preempted = self.scheduler.requests.values()
        self.num_preempted = max(
            self.num_preempted, sum(request.num_preemptions for request in preempted)
        )


def without_shift() -> None:
    """Let attention believe that each key was rotated where it is read: a control."""
    from tokendance.attention.interface import PackedBatch
    from tokendance.integrations.vllm.contexts import Contexts

    def batch(self: Contexts, requests: list[Any]) -> PackedBatch:
        slot_position = self.slot_position.copy()
        for request in requests:
            slots = request.slots[: int(request.positions[-1]) + 1]
            slot_position[slots] = range(len(slots))
        return PackedBatch(requests, slot_position)

    Contexts.batch = batch  # type: ignore[method-assign]


def without_check() -> None:
    """Start although a round is computed wrongly."""
    from tokendance.integrations.vllm import worker

    setattr(worker, "check_round", lambda _: None)  # noqa: B010


# Here, as processes of other ranks import this file, and call no main().
if os.environ.get("TEST_WITHOUT_SHIFT"):
    without_shift()
if os.environ.get("TEST_WITHOUT_CHECK"):
    without_check()
if os.environ.get("TEST_CUDA_ATTENTION"):
    stand_ins.flash_attention()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    runner = Runner(job["model"], job["engine"])
    results: dict[str, Any] = {
        name: runner.run(script) for name, script in job["scenarios"].items()
    }
    results["attended"] = stand_ins.attended
    results["scheduler"] = type(runner.scheduler).__name__
    worker = getattr(runner.engine.model_executor, "driver_worker", None)
    if worker is not None:
        results["runner"] = type(worker.worker.model_runner).__module__
    print("\n" + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
