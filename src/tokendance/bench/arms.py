"""What suites have in common of what they compare: engines, rounds, and vLLM beside them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tokendance.bench.settings import BenchSettings
from tokendance.bench.vllm import HOW_TO_INSTALL, VLLM, VLLMConfig, VLLMResult, find_vllm
from tokendance.bench.workload import RoundWorkload, WorkloadSpec
from tokendance.collector.correction import NO_CORRECTION
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, checkpoint_source, load_model
from tokendance.options import EngineOptions, ReuseMode
from tokendance.outputs import RoundResult
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt

DTYPES = ("bfloat16", "float32")
PAGE_SIZE = EngineOptions().page_size


def load(settings: BenchSettings, dtype: str = "bfloat16") -> LoadedModel:
    """Load the model of a suite, in a dtype that the suite chooses."""
    return load_model(settings.model, dtype, settings.engine.device)


def make_engines(
    model: LoadedModel,
    options: EngineOptions,
    modes: Iterable[ReuseMode],
    num_tokens: int,
    *,
    one_memory: bool = False,
) -> dict[str, LLM]:
    """Make an engine per mode, each with room for `num_tokens`, and one that is called "floor".

    The floor is `collective` with nothing corrected: a round of N agents then computes S + N t
    tokens in one packed pass, the least that shares all there is to share.

    With `one_memory` they take turns on it: what one has stored, the next overwrites, so the store
    is to be cleared before each use.
    """
    num_pages = -(-num_tokens // PAGE_SIZE)
    budget = num_pages * PAGE_SIZE * model.shape.kv_bytes_per_token(model.dtype)
    pool = KVPool(model, num_pages * PAGE_SIZE) if one_memory else None
    options = replace(options, kv_budget=budget)
    arms = {str(mode): replace(options, reuse=mode) for mode in modes}
    arms["floor"] = replace(options, reuse="collective", correction=NO_CORRECTION)
    return {name: LLM.from_loaded(model, arm, pool=pool) for name, arm in arms.items()}


def pool_of(llm: LLM) -> KVPool:
    """The KV memory of an engine that runs on torch."""
    assert isinstance(llm.executor, TorchExecutor)
    return llm.executor.pool


def answer_params(num_tokens: int) -> SamplingParams:
    """Greedy answers of exactly so many tokens."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def run_checked(llm: LLM, prompts: list[Prompt], num_tokens: int) -> RoundResult:
    """Run a round; an agent that failed is an error, not a quick answer."""
    result = llm.run_round(prompts, answer_params(num_tokens))
    result.raise_for_errors()
    return result


def wall_seconds(result: RoundResult) -> float:
    """Seconds of a whole round."""
    return result.stats.prefill_s + result.stats.decode_s


def timed_spec(settings: BenchSettings, agents: int) -> WorkloadSpec:
    """The rounds of suites that time them."""
    if settings.tiny:
        return WorkloadSpec(agents, 40, (20, 40), source=settings.source, seed=settings.seed)
    return WorkloadSpec(agents, source=settings.source, seed=settings.seed)


def vllm_round(vllm: VLLM, llm: LLM, workload: RoundWorkload, num_tokens: int) -> VLLMResult:
    """Run a round's token ids through vLLM, with the private parts in its prefix cache.

    Args:
        vllm: started on the same model.
        llm: encodes the prompts.
        workload: the round.
        num_tokens: of each answer.
    """
    encoded = workload.encoded(llm)
    vllm.reset()
    vllm.run([prompt.segments[0].token_ids.tolist() for prompt in encoded], 1)
    return vllm.run([prompt.token_ids.tolist() for prompt in encoded], num_tokens)


@contextmanager
def started_vllm(
    settings: BenchSettings,
    console: Console,
    *,
    max_context: int,
    num_tokens: int,
    token_bytes: int,
) -> Iterator[VLLM | None]:
    """Start vLLM if the user asks for it and it is installed; say so where it is not.

    Args:
        settings: of the suite.
        console: to say it on.
        max_context: longest prompt with its answer.
        num_tokens: that its KV memory has room for.
        token_bytes: of the KV of one token in bfloat16.
    """
    if settings.against != "vllm":
        yield None
    elif find_vllm() is None:
        console.print(f"vLLM is left out: it is not installed. {HOW_TO_INSTALL}")
        yield None
    else:
        folder = Path(checkpoint_source(settings.model))
        config = VLLMConfig(max_context=max_context, kv_bytes=num_tokens * token_bytes)
        with console.status("Starting vLLM (it compiles the model: about two minutes) ..."):
            vllm = VLLM(folder, config)
        with vllm:
            yield vllm
