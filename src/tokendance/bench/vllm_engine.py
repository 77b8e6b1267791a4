"""vLLM, as `worker_main.py` starts it in vLLM's own environment for `bench/vllm.py`.

Each request is one line, and so is its reply:

    {"op": "start", "engine": {...}}             {"version": "0.32.0", "plugin": true,
                                                  "said": ["...", ...]}
    {"op": "run", "prompts": [[1, 2], ...],      {"seconds": 1.5, "token_ids": [[3], ...],
     "max_tokens": 1}                             "cached_tokens": [0, ...],
                                                  "computed_tokens": 2, "peak_blocks": 1}
    {"op": "reset"}                              {}

`engine` holds the arguments of `vllm.LLM`; `plugin` is whether TokenDance is inside, and `said`
what it has logged. A `run` may say of each prompt which "blocks" others read: [[5, 9], ...]. With
"forced": [[3], ...] these are its answers, and with "file": PATH it leaves there, as .npz, the
log-probabilities of each answer, float32 (tokens, vocabulary).
"""

import importlib
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# By its name, since type checkers do not find it in the environment that they run in.
vllm: Any = importlib.import_module("vllm")
_processors: Any = importlib.import_module("vllm.v1.sample.logits_processor")


class _Forced(_processors.AdapterLogitsProcessor):  # type: ignore[misc]
    """Has requests say what their `extra_args` name. Log-probabilities are taken before."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Any], Any] | None:
        forced = (params.extra_args or {}).get("forced")
        return None if forced is None else lambda said, logits: _only(logits, forced[len(said)])


def _only(logits: Any, token: int) -> Any:
    kept = logits[token].item()
    logits.fill_(float("-inf"))
    logits[token] = kept
    return logits


class _Counts:
    """Counts what a scheduler schedules, by standing in its `schedule`."""

    def __init__(self, scheduler: Any) -> None:
        self._pool = scheduler.kv_cache_manager.block_pool
        self._schedule = scheduler.schedule
        scheduler.schedule = self._counted
        self.reset()

    def reset(self) -> None:
        self.computed_tokens = self.peak_blocks = 0

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self.computed_tokens += output.total_num_scheduled_tokens
        # One block is vLLM's null block.
        used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        self.peak_blocks = max(self.peak_blocks, used)
        return output


class _Engine:
    """vLLM, what it logged of the plug-in at its start, and what it schedules."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.said: list[str] = []
        # Not a handler: vLLM configures its loggers anew while it starts, and takes handlers away.
        logging.getLogger("vllm.tokendance").addFilter(self._listen)
        # Only an engine whose answers are scored takes a processor: it costs time.
        processors = {"logits_processors": [_Forced]} if arguments["max_logprobs"] < 0 else {}
        # With its statistics, as vLLM's server runs.
        self.llm = vllm.LLM(**arguments, **processors, disable_log_stats=False)
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.has_plugin = type(scheduler).__module__.startswith("tokendance.")
        self.counts = _Counts(scheduler)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        match request["op"]:
            case "run":
                return _run(self, request)
            case "reset":
                if not self.llm.reset_prefix_cache():
                    raise RuntimeError("vLLM did not reset its prefix cache")
                return {}
            case operation:
                raise ValueError(f"there is no operation {operation!r}")

    def _listen(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())
        return True


def start(request: dict[str, Any]) -> tuple[_Engine, dict[str, Any]]:
    """Start vLLM, and return it with what is replied."""
    engine = _Engine(request["engine"])
    reply = {"version": vllm.__version__, "plugin": engine.has_plugin, "said": engine.said}
    return engine, reply


def _run(engine: _Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Answer all prompts together, greedily, with exactly `max_tokens` tokens each."""
    prompts = request["prompts"]
    said = {name: request[name] for name in ("forced", "blocks") if name in request}
    is_scored = "file" in request
    params = [
        vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,  # nobody reads the text, so vLLM is spared making it
            logprobs=-1 if is_scored else None,
            flat_logprobs=is_scored,
            extra_args={name: values[index] for name, values in said.items()} or None,
        )
        for index in range(len(prompts))
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    engine.counts.reset()
    start = time.perf_counter()
    outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    if is_scored:
        arrays = {str(i): _dense(output.outputs[0].logprobs) for i, output in enumerate(outputs)}
        np.savez(request["file"], allow_pickle=False, **arrays)
    return {
        "seconds": seconds,
        "cached_tokens": [output.num_cached_tokens for output in outputs],
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "computed_tokens": engine.counts.computed_tokens,
        "peak_blocks": engine.counts.peak_blocks,
    }


def _dense(flat: Any) -> np.ndarray:
    """Log-probabilities by token id, of vLLM's flat ones, which name the sampled token twice."""
    rows = list(zip(flat.start_indices, flat.end_indices, strict=True))
    dense = np.full((len(rows), max(flat.token_ids) + 1), -np.inf, np.float32)
    for row, (begin, end) in enumerate(rows):
        dense[row, flat.token_ids[begin:end]] = flat.logprobs[begin:end]
    return dense
