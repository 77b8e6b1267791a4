"""The parts of what is found out on a GPU: each yields figures as soon as it has them."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from gpu.profiling import profile_work
from gpu.synthetic import (
    QWEN25_7B,
    as_model,
    matmul_weights,
    random_module,
    random_prompts_around,
    random_round,
)
from gpu.worker import Figures, Job, Parts
from tokendance.attention.names import AttentionName
from tokendance.bench.arms import AHEAD_TOKENS, DecodingRound, run_checked
from tokendance.bench.pic import PicExecutor
from tokendance.bench.suite import in_turn, ratio, spread
from tokendance.bench.workload import WorkloadSpec, keep_private_parts
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions, ReuseMode
from tokendance.outputs import Output
from tokendance.params import SamplingParams

MODES: tuple[ReuseMode, ...] = ("prefix", "pic-batched", "collective")
# Largest difference of a log-probability, in nats, that summing float32 in another order may make.
TOLERANCE = 1e-3
_MAX_BATCHED_TOKENS = 8192  # as engines on such devices have it
_PROFILE_S = 15.0  # that a profile takes
_WARM_UP_STEPS = 2  # of decoding


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How large everything is.

    Attributes:
        model: whose time is measured, in bfloat16; random weights.
        small_model: whose answers are compared, in float32.
        small_round: likewise.
        answer_tokens: of each agent in that round.
        task_tokens: of all rounds.
        block_tokens: of the rounds whose prefill is measured.
        private_tokens: likewise.
        repeats: of these, at most.
        decoding: agents, shared tokens, own tokens.
        steps: of decoding that count, at most.
        profiled_steps: that are profiled.
        matmul: side of a matrix.
        copied_bytes: from one place to another.
    """

    model: dict[str, Any]
    small_model: dict[str, Any]
    small_round: WorkloadSpec
    answer_tokens: int
    task_tokens: int
    block_tokens: int
    private_tokens: tuple[int, int]
    repeats: int
    decoding: tuple[int, int, int]
    steps: int
    profiled_steps: int
    matmul: int
    copied_bytes: int


_SMALL = {
    **QWEN25_7B,
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 2000,
    # The likeliest token is 0.02 nats ahead of the next, or more; sums in another order make 1e-4.
    "initializer_range": 0.1,
}
_TINY = {
    **_SMALL,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 300,
}
_PUBLISHED = WorkloadSpec()  # what docs/benchmarks.md measures
_FULL_SIZES = _Sizes(
    model=QWEN25_7B,
    small_model=_SMALL,
    small_round=WorkloadSpec(4, private_tokens=(100, 300)),
    answer_tokens=8,
    task_tokens=22,
    block_tokens=_PUBLISHED.block_tokens,
    private_tokens=_PUBLISHED.private_tokens,
    repeats=5,
    decoding=(32, 2048, 512),
    steps=32,
    profiled_steps=4,
    matmul=8192,
    copied_bytes=2**32,
)
_TINY_SIZES = _Sizes(
    model=_TINY,
    small_model=_TINY,
    small_round=WorkloadSpec(2, 6, (4, 8)),
    answer_tokens=2,
    task_tokens=4,
    block_tokens=10,
    private_tokens=(10, 20),
    repeats=1,
    decoding=(2, 20, 8),
    steps=2,
    profiled_steps=1,
    matmul=128,
    copied_bytes=2**20,
)


def _sizes(job: Job) -> _Sizes:
    return _TINY_SIZES if job.tiny else _FULL_SIZES


def look_at_device(job: Job) -> Iterator[Figures]:
    """What it is, and what it does best: products of matrices, and copies (read and write)."""
    device, sizes = torch.device(job.device), _sizes(job)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    left = torch.randn(sizes.matmul, sizes.matmul, dtype=torch.bfloat16, device=device)
    right, copied = torch.randn_like(left), torch.randn(sizes.copied_bytes // 4, device=device)
    target = torch.empty_like(copied)
    runs = {
        "matmul": partial(_seconds, device, lambda: left @ right),
        "copy": partial(_seconds, device, lambda: target.copy_(copied)),
    }
    medians = {name: statistics.median(found) for name, found in in_turn(runs, 10, 3).items()}
    yield {
        "matmul_tflops": 2e-12 * sizes.matmul**3 / medians["matmul"],
        "copy_tb_per_s": 2e-12 * sizes.copied_bytes / medians["copy"],
    }


def compare_with_cpu(job: Job, attention: AttentionName) -> Iterator[Figures]:
    """Answers of a small round in float32, against the reference on the CPU."""
    sizes, cpu = _sizes(job), torch.device("cpu")
    torch.set_float32_matmul_precision("highest")  # no TF32
    module = random_module(sizes.small_model, torch.float32, cpu)
    on_device, on_cpu = as_model(module, torch.device(job.device)), as_model(module, cpu)
    prompts = random_round(sizes.small_round, sizes.task_tokens, on_cpu.shape.vocab_size)
    params = SamplingParams(max_tokens=sizes.answer_tokens, ignore_eos=True, keep_logprobs=True)
    wrong = []
    num_slots = sizes.small_round.agents * _room(sizes.small_round)

    def answers(model: LoadedModel, mode: ReuseMode, by: AttentionName) -> tuple[Output, ...]:
        result = _make_llm(model, mode, by, KVPool(model, num_slots)).run_round(prompts, params)
        result.raise_for_errors()
        return result.outputs

    for mode in MODES:
        expected = answers(on_cpu, mode, "reference")
        found = answers(on_device, mode, attention)
        error, margin, same = _difference(found, expected)
        yield {mode: {"max_logprob_error": error, "least_margin": margin, "same_tokens": same}}
        if not (same and error <= TOLERANCE):
            wrong.append(mode)
    assert not wrong, f"answers are not those of the CPU, in {wrong}"


def measure_prefill(job: Job, agents: int) -> Iterator[Figures]:
    """Seconds of a round's prefill in each mode, private parts cached; a profile of collective."""
    deadline, sizes = time.perf_counter() + job.seconds, _sizes(job)
    agents = min(agents, 3) if job.tiny else agents
    model = _large_model(job.device, job.tiny)
    spec = WorkloadSpec(agents, sizes.block_tokens, sizes.private_tokens)
    prompts = random_round(spec, sizes.task_tokens, model.shape.vocab_size)
    # Each mode clears its store before it begins, so they take turns on one memory.
    pool = KVPool(model, agents * _room(spec))
    engines = {mode: _make_llm(model, mode, job.attention, pool) for mode in MODES}
    encoded = [engines["prefix"].encoder.encode(prompt) for prompt in prompts]
    computed: dict[str, int] = {}

    def run(mode: ReuseMode) -> float:
        keep_private_parts(engines[mode], encoded)
        return _seconds(model.device, lambda: answer(mode))

    def answer(mode: ReuseMode) -> None:
        result = run_checked(engines[mode], prompts, 1)
        computed[mode] = result.stats.computed_tokens

    runs: dict[ReuseMode, Callable[[], float]] = {mode: partial(run, mode) for mode in MODES}
    seconds = in_turn(runs, sizes.repeats, until_s=deadline - _PROFILE_S)
    yield {"agents": agents, "attention": job.attention, "repeats": len(seconds["prefix"])}
    for mode in MODES:
        median = statistics.median(seconds[mode])
        tflops = 2e-12 * matmul_weights(model) * computed[mode] / median
        yield {
            mode: {
                "computed_tokens": computed[mode],
                **spread(seconds[mode]),
                "vs_collective": ratio(seconds[mode], seconds["collective"]),
                "matmul_tflops": tflops,
            }
        }
    if time.perf_counter() + _PROFILE_S > deadline:
        yield {"left_out": "the profile, for lack of time"}
        return
    keep_private_parts(engines["collective"], encoded)
    plain_s = statistics.median(seconds["collective"])
    yield {
        "profile": profile_work(
            lambda: _seconds(model.device, lambda: answer("collective")),
            plain_s,
            job.out / f"profile-{job.part}.txt",
        )
    }


def measure_decoding(job: Job) -> Iterator[Figures]:
    """Steps of agents that decode at once, by each backend and from dense copies; profiles."""
    deadline, sizes = time.perf_counter() + job.seconds, _sizes(job)
    agents, num_shared, num_own = sizes.decoding
    rounds = _start_decoding(job)
    yield {"agents": agents, "shared": num_shared, "own": num_own, "dense_by": job.attention}
    steps = {name: decoding.step for name, decoding in rounds.items()}
    seconds = in_turn(steps, sizes.steps, _WARM_UP_STEPS, until_s=deadline - _PROFILE_S)
    for name, found in seconds.items():
        milliseconds = spread([1e3 * one for one in found])
        yield {
            name: {
                "tokens_per_s": agents / statistics.median(found),
                **{f"{key}_ms": value for key, value in milliseconds.items()},
                "vs_collective": ratio(found, seconds[job.attention]),
                "steps": len(found),
            }
        }
    if time.perf_counter() + _PROFILE_S > deadline:
        yield {"left_out": "the profiles, for lack of time"}
        return
    # Where the CPU needs longer to start kernels than they take, all steps take as long. What the
    # kernels take is compared by the time in which the device was busy.
    busy_ms = {}
    for name, step in steps.items():
        profile = profile_work(
            partial(_repeat, step, sizes.profiled_steps),
            sizes.profiled_steps * statistics.median(seconds[name]),
            job.out / f"profile-{job.part}-{name}.txt",
        )
        busy_ms[name] = profile["busy_ms"]
        if name == job.attention:
            yield {"profile": profile}
    yield {"profiled_steps": sizes.profiled_steps, "busy_ms": busy_ms}


def _start_decoding(job: Job) -> dict[str, DecodingRound]:
    """A round that decodes, for each backend that shares, and one of dense copies."""
    sizes, model = _sizes(job), _large_model(job.device, job.tiny)
    agents, num_shared, num_own = sizes.decoding
    kinds: dict[str, tuple[ReuseMode, AttentionName]] = {
        job.attention: ("collective", job.attention),
        "torch": ("collective", "torch"),
        "dense": ("prefix", job.attention),
    }
    prompts = random_prompts_around(agents, num_shared, num_own, model.shape.vocab_size)
    num_steps = _WARM_UP_STEPS + sizes.steps + sizes.profiled_steps
    num_slots = agents * (num_shared + num_own + num_steps + 2 * AHEAD_TOKENS)
    return {
        name: DecodingRound(
            _make_llm(model, mode, attention, KVPool(model, num_slots)), prompts, num_steps
        )
        for name, (mode, attention) in kinds.items()
    }


PARTS: Parts = {
    "device": look_at_device,
    "equal-torch": partial(compare_with_cpu, attention="torch"),
    "equal-triton": partial(compare_with_cpu, attention="triton"),
    "prefill-10": partial(measure_prefill, agents=10),
    "decode": measure_decoding,
    "prefill-50": partial(measure_prefill, agents=50),
}


@cache
def _large_model(device: str, tiny: bool) -> LoadedModel:
    """The model whose time is measured; parts that follow each other have it in common."""
    shape = (_TINY_SIZES if tiny else _FULL_SIZES).model
    target = torch.device(device)
    return as_model(random_module(shape, torch.bfloat16, target), target)


def _make_llm(model: LoadedModel, reuse: ReuseMode, attention: AttentionName, pool: KVPool) -> LLM:
    """An engine over some memory. On a CPU, Triton's kernels run in its interpreter."""
    num_slots = len(pool.slot_position)
    options = EngineOptions(
        reuse=reuse,
        attention=attention,
        kv_budget=num_slots * model.shape.kv_bytes_per_token(model.dtype),
        max_num_batched_tokens=_MAX_BATCHED_TOKENS,
    )
    if attention != "triton" or model.device.type == "cuda":
        return LLM.from_loaded(model, options, pool=pool)
    from tokendance.attention.triton_backend import TritonBackend

    executor = PicExecutor if options.takes_copies else TorchExecutor
    return LLM.from_loaded(model, options, executor=executor(model, pool, TritonBackend))


def _room(spec: WorkloadSpec) -> int:
    """Slots for a prompt of a round with its answer, in whole pages."""
    return max(spec.private_tokens) + spec.agents * spec.block_tokens + 200


def _difference(found: Sequence[Output], expected: Sequence[Output]) -> tuple[float, float, bool]:
    """Compare answers.

    Returns:
        The largest difference of a log-probability, up to the first token that differs; how much
        likelier than the next the expected tokens are, at least; and whether all are the same.
    """
    error, margin = 0.0, float("inf")
    for one, other in zip(found, expected, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=True))
        num_same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        for ours, theirs in list(zip(one.logprobs, other.logprobs, strict=True))[: num_same + 1]:
            error = max(error, float((ours - theirs).abs().max()))
            first, second = theirs.topk(2).values.tolist()
            margin = min(margin, first - second)
    same = all(one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True))
    return error, margin, same


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of some work, until the device is done with it."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
