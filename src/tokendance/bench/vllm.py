"""Drives the real vLLM, plain or with TokenDance inside, in an environment of its own.

    with VLLM(checkpoint, VLLMConfig(max_context=4096)) as vllm:
        vllm.run(private_parts, max_tokens=1)   # now they are in its prefix cache
        print(vllm.run(prompts, max_tokens=1).seconds)
        vllm.reset()

See `bench/worker.py` for its process; what runs in it is `vllm_engine.py`.

The defaults follow what vLLM's documentation advises for CPUs; see `child_environment` too.
"""

import ctypes.util
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tokendance.bench.worker import WORKER_MAIN, Environment, Worker, inherited_variables
from tokendance.errors import BaselineError

VLLM_ENVIRONMENT = Environment("vLLM", "TOKENDANCE_VLLM_PYTHON", ".venv-vllm", "vllm")
SCRIPTS = (WORKER_MAIN, Path(__file__).with_name("vllm_engine.py"))


@dataclass(frozen=True, slots=True)
class VLLMConfig:
    """Settings of the baseline. The model is compiled, which takes a C++ compiler and minutes.

    Attributes:
        dtype: of weights and KV.
        max_context: longest prompt with its answer, in tokens.
        threads: of one pass; as many as our own engine takes.
        kv_bytes: memory for KV.
        block_size: tokens per KV block, a multiple of 32.
        max_num_batched_tokens: tokens of one pass at most.
        max_num_seqs: requests of one pass at most.
        plugin: with TokenDance inside.
        max_logprobs: log-probabilities of a token that may be asked for; -1: of the vocabulary.
    """

    dtype: str = "bfloat16"
    max_context: int = 4096
    threads: int = field(default_factory=torch.get_num_threads)
    kv_bytes: int = 2**31
    block_size: int = 32
    max_num_batched_tokens: int = 4096
    max_num_seqs: int = 256
    plugin: bool = False
    max_logprobs: int = 20

    def engine_arguments(self, model: Path) -> dict[str, object]:
        """What `vllm.LLM` is called with."""
        return {
            "model": str(model),
            "dtype": self.dtype,
            "max_model_len": self.max_context,
            "block_size": self.block_size,
            "kv_cache_memory_bytes": self.kv_bytes,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": False,
            "enable_prefix_caching": True,
            "max_logprobs": self.max_logprobs,
            # Sampling is as asked, not as the model's folder suggests.
            "generation_config": "vllm",
        }


@dataclass(frozen=True, slots=True)
class VLLMResult:
    """What one call of `VLLM.run` gave. Sequences are in the order of the prompts."""

    seconds: float  # from submission of all prompts to the last token of the last answer
    cached_tokens: tuple[int, ...]  # tokens of each prompt that vLLM found in its prefix cache
    token_ids: tuple[tuple[int, ...], ...]  # the answers
    computed_tokens: int  # of all passes, answers included
    peak_blocks: int  # KV blocks that somebody held, at most


def count_blocks(prompts: Iterable[Sequence[int]], answer_tokens: int, block_size: int) -> int:
    """Count the KV blocks that vLLM holds while all of these run: equal beginnings are shared."""
    full: set[int] = set()
    partial = 0
    for prompt in prompts:
        num_full = len(prompt) // block_size
        before = 0
        for block in range(num_full):
            before = hash((before, *prompt[block * block_size : (block + 1) * block_size]))
            full.add(before)
        partial += -(-(len(prompt) + answer_tokens) // block_size) - num_full
    return len(full) + partial


class VLLM:
    """One vLLM engine in a process of its own. Close it, or use it as a context manager.

    Args:
        model: folder of the checkpoint.
        config: its settings.
        python: of the environment that has vLLM; by default what `VLLM_ENVIRONMENT` finds.
        scripts: what that Python runs; it speaks the protocol of `vllm_engine.py`.
        start_timeout_s: seconds that vLLM may take to load and to compile.

    Raises:
        BaselineError: There is no vLLM, or it did not start.
    """

    def __init__(
        self,
        model: Path,
        config: VLLMConfig | None = None,
        *,
        python: Path | None = None,
        scripts: Sequence[Path] = SCRIPTS,
        start_timeout_s: float = 600.0,
    ) -> None:
        config = config or VLLMConfig()
        python = python or VLLM_ENVIRONMENT.require()
        variables = child_environment(python, config)
        self._worker = Worker(VLLM_ENVIRONMENT, python, scripts, variables)
        request = {"op": "start", "engine": config.engine_arguments(model)}
        started = self._worker.ask(request, start_timeout_s)
        self.version: str = str(started.get("version"))
        if config.plugin and not started.get("plugin"):
            self._worker.close(0)
            said = " ".join(started.get("said", ()))
            raise BaselineError(
                said
                or f"TokenDance is not installed in the environment of {python}. Run `make vllm`."
            )
        self.block_size = config.block_size
        self.settings = (
            f"vLLM {self.version}: {config.dtype}, prefix caching, blocks of {config.block_size}, "
            f"compiled, {config.threads} threads, up to {config.max_num_batched_tokens} tokens a "
            "pass."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        timeout_s: float = 1800.0,
        *,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> VLLMResult:
        """Answer prompts that are all submitted at once, greedily and past any end of text.

        Args:
            prompts: token ids, at least one prompt.
            max_tokens: tokens of each answer.
            timeout_s: seconds after which vLLM is taken to hang.
            blocks: for each prompt positions begin, end, begin, end, ... of what others read, too,
                as a client would say it (docs/vllm.md); left out: nothing is said.

        Raises:
            BaselineError: vLLM failed, died or hung; it is closed then.
        """
        return self._run(prompts, max_tokens, timeout_s, _tags(blocks))

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        timeout_s: float,
        further: Mapping[str, object],
    ) -> VLLMResult:
        request = {
            "op": "run",
            "prompts": [[int(token) for token in prompt] for prompt in prompts],
            "max_tokens": max_tokens,
            **further,
        }
        reply = self._worker.ask(request, timeout_s)
        try:
            result = VLLMResult(
                seconds=float(reply["seconds"]),
                cached_tokens=tuple(map(int, reply["cached_tokens"])),
                token_ids=tuple(tuple(map(int, answer)) for answer in reply["token_ids"]),
                computed_tokens=int(reply["computed_tokens"]),
                peak_blocks=int(reply["peak_blocks"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._worker.failed(f"gave a reply that lacks a figure ({error!r})") from error
        lengths = [len(answer) for answer in result.token_ids]
        if lengths != [max_tokens] * len(prompts):
            raise self._worker.failed(
                f"was asked for {len(prompts)} answers of {max_tokens} tokens, and gave {lengths}"
            )
        return result

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        timeout_s: float = 1800.0,
        *,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> tuple[VLLMResult, list[Tensor]]:
        """Answer prompts with given tokens; what the model would have said, by its logprobs.

        Args:
            prompts: token ids, at least one prompt.
            answers: token ids that each is made to say, all of one length.
            timeout_s: seconds after which vLLM is taken to hang.
            blocks: see `run`.

        Returns:
            What `run` does, and for each prompt log-probabilities, float32 (tokens, vocabulary).

        Raises:
            BaselineError: see `run`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logprobs.npz"
            forced = [list(map(int, answer)) for answer in answers]
            further = {"forced": forced, "file": str(path), **_tags(blocks)}
            result = self._run(prompts, len(answers[0]), timeout_s, further)
            with np.load(path) as arrays:
                return result, [torch.from_numpy(arrays[str(i)]) for i in range(len(prompts))]

    def reset(self, timeout_s: float = 60.0) -> None:
        """Empty the prefix cache.

        Raises:
            BaselineError: vLLM refused, died or hung; it is closed then.
        """
        self._worker.ask({"op": "reset"}, timeout_s)

    def close(self) -> None:
        """End the process and all that it started; may come again."""
        self._worker.close()


def _tags(blocks: Sequence[Sequence[int]] | None) -> dict[str, object]:
    """What a request to the worker says of blocks."""
    return {} if blocks is None else {"blocks": [list(map(int, places)) for places in blocks]}


def child_environment(python: Path, config: VLLMConfig) -> dict[str, str]:
    """Environment variables for vLLM: ours, and what its documentation advises on a CPU."""
    environment = inherited_variables()
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(config.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else engines that take turns share a core
        "TOKENDANCE": str(int(config.plugin)),
        # By default vLLM's scheduler is a process of its own that polls, and one core is kept for
        # it. In one process it runs between passes, and all cores compute.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # What vLLM sets for Intel's OpenMP in the worker processes that there are none of now.
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }
    if sys.platform == "linux":
        tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
        openmp = python.parent.parent / "lib" / "libiomp5.so"  # Intel's, beside vLLM
        libraries = [tcmalloc, str(openmp) if openmp.is_file() else None]
        if any(libraries):
            preloaded = [*libraries, os.environ.get("LD_PRELOAD")]
            environment["LD_PRELOAD"] = ":".join(library for library in preloaded if library)
    return environment
