"""Scenarios inside vLLM: run by its own Python, which answers each JSON line by one.

    {"model": FOLDER, "engine": {...}, "scenarios": {NAME: [STEP, ...]}}
    {"scenarios": {NAME: [STEP, ...]}}      in the same engine, as often as one likes

A step is one of

    {"add": [{"id": ..., "tokens": [...], "max_tokens": ..., "extra": {...}, ...}]}
    {"steps": N}          engine steps
    {"until": [id, STAGE] or [id, STAGE, ROLE]}      steps until a request has come so far
    {"abort": [ids]}
    {"call": [METHOD, ARGUMENTS]}      of vLLM's engine core, as its API server calls them
    {"finish": true}      steps until nothing is left

The answer has for each scenario the token ids of each request, and how many of its prompt tokens
came from a cache; who was preempted, as what; who ran at the last call, and how many tokens it had
said; then what is left of blocks when all that was kept is given up.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
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
        self.core = self.engine.engine_core.engine_core
        self.answers: dict[str, dict[str, Any]] = {}
        self.said: dict[str, int] = {}
        self.preempted: list[tuple[str, str]] = []
        self.peak_blocks = 0
        preempt = self.scheduler._preempt_request

        def note_and_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            self.preempted.append((_name(request.request_id), self._role(request.request_id)))
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = note_and_preempt

    def run(self, script: list[dict[str, Any]]) -> dict[str, Any]:
        self.answers, self.said, self.preempted, self.peak_blocks = {}, {}, [], 0
        self.llm.reset_prefix_cache()
        for step in script:
            for request in step.get("add", ()):
                self._add(request)
            if "abort" in step:
                self.engine.abort_request(step["abort"], internal=False)
            for _ in range(step.get("steps", 0)):
                self._step()
            if "until" in step:
                self._step_until(partial(self._has_come, *step["until"]))
            if "call" in step:
                name, arguments = step["call"]
                self.said = {_name(one): 0 for one in self.scheduler.requests}
                for one in self.said.keys() & self.answers.keys():
                    self.said[one] = len(self.answers[one]["tokens"])
                getattr(self.core, name)(**arguments)
            if step.get("finish"):
                self._step_until(lambda: not self.engine.has_unfinished_requests())
        self._step()  # lets go of what was aborted last
        rounds = getattr(self.scheduler, "_rounds", None)
        result = {
            "answers": self.answers,
            "said": self.said,
            "preempted": self.preempted,
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

    def _step_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < deadline, "somebody waits for ever"
            self._step()

    def _has_come(self, name: str, *stage: str) -> bool:
        return self._stage(name)[: len(stage)] == [*stage]

    def _stage(self, name: str) -> list[str]:
        """How far a request has come, and what it is to others."""
        scheduler = self.scheduler
        (request_id,) = (one for one in self._known() if _name(one) == name)
        assert scheduler.has_request(request_id)
        if request_id in scheduler._requests:
            waits = any(one.request_id == request_id for one in scheduler._rounds._waiting)
            return ["waits for an owner" if waits else "in the window"]
        request = scheduler.requests[request_id]
        if request.num_computed_tokens == 0:
            stage = "waits for a seat"
        elif request.num_output_tokens == 0:
            stage = "prefills"
        else:
            stage = "decodes"
        return [stage, self._role(request_id)]

    def _known(self) -> list[str]:
        return [*getattr(self.scheduler, "_requests", ()), *self.scheduler.requests]

    def _role(self, request_id: str) -> str:
        member = getattr(self.scheduler, "_members", {}).get(request_id)
        if member is None:
            return "plain"
        return "owner" if any(member.owned) else "mirror" if member.is_mirror else "plain"


def _name(request_id: str) -> str:
    """A request's name in its scenario: vLLM adds something to be sure that there is one only."""
    return request_id.rsplit("-", 1)[0]


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
    runner = None
    for line in sys.stdin:
        job = json.loads(line)
        if runner is None:
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
