"""`decode`: tokens per second of agents that read one shared run, by agents and lengths.

`dense` is the same engine with each agent's KV in one piece of its own (mode `prefix`, where the
shared text stands behind the private part and so is stored once per agent); `collective` reads
the shared run where it lies. All decode in turn, some steps each, so that they see the same
machine; only vLLM, which gives no single steps, decodes apart.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import (
    AHEAD_TOKENS,
    DecodingRound,
    context_too_short,
    load,
    make_engines,
    prompts_around,
)
from tokendance.bench.llamacpp import MODES, LlamaCpp
from tokendance.bench.plots import draw_lines
from tokendance.bench.rivals import (
    LlamaCppPrompts,
    least_over_modes,
    started_llamacpp,
    started_vllm,
)
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import TOWN, read_people
from tokendance.llm import LLM
from tokendance.models.loader import checkpoint_source
from tokendance.models.packing import weight_bytes
from tokendance.options import ReuseMode
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.pages import Holder

# (agents, shared tokens, own tokens)
Size = tuple[int, int, int]
FULL_SIZES: tuple[Size, ...] = (
    (1, 2048, 512),
    (4, 2048, 512),
    (10, 2048, 512),
    (32, 2048, 512),
    (32, 512, 512),
    (32, 2048, 64),
)
TINY_SIZES: tuple[Size, ...] = ((2, 60, 20), (3, 60, 20))
HEADLINE_SIZE = (32, 2048, 512)
# Agents with which other engines are measured, at the lengths of the headline.
_RIVAL_AGENTS = (1, 10, 32)
_STEPS_A_TURN = 4
_NAMES: dict[ReuseMode, str] = {"prefix": "dense", "collective": "collective"}
_COLUMNS = {
    "agents": "agents",
    "shared": "shared",
    "own": "own",
    "mode": "mode",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms a step",
    "min_ms": "min",
    "max_ms": "max",
    "vs_mode": "collective x",
    "weights_mib": "weights MiB",
    "kv_mib": "KV MiB",
}


@dataclass(frozen=True, slots=True)
class _Memory:
    """What an engine holds behind the prefill, in bytes."""

    weights: int
    kv: int


@dataclass(frozen=True, slots=True)
class _Arm:
    """One thing that decodes a step at a time."""

    step: Callable[[], float]  # takes all agents one token further, and returns the seconds
    memory: _Memory


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes = list(TINY_SIZES if settings.tiny else FULL_SIZES)
    num_turns = 2 if settings.tiny else 8
    num_steps = (1 + num_turns) * (1 + _STEPS_A_TURN)
    headline_size = TINY_SIZES[-1] if settings.tiny else HEADLINE_SIZE
    model = load(settings)
    notes: list[str] = []
    max_context = model.shape.max_context
    ahead = num_steps + AHEAD_TOKENS
    for size in [size for size in sizes if size[1] + size[2] + ahead > max_context]:
        notes.append(f"{size} is left out: the context holds {max_context} tokens.")
        sizes.remove(size)
    if not sizes:
        raise context_too_short(model)
    room = max(agents * (num_shared + num_own + 200) for agents, num_shared, num_own in sizes)
    longest = max(num_shared + num_own + 200 for _, num_shared, num_own in sizes)
    # All hold their agents' KV at the same time, so each has memory of its own.
    engines = make_engines(model, settings.engine, _NAMES, room)
    encoder = engines["prefix"]
    table = LiveTable(console, "decoding, all agents at once, bfloat16", _COLUMNS)
    with (
        started_vllm(settings, console, model, notes, max_context=longest, num_tokens=room) as vllm,
        started_llamacpp(settings, console, notes) as llama,
    ):
        for size in sizes:
            prompts = make_prompts(encoder, *size, settings.seed)
            encoded = [encoder.encoder.encode(prompt) for prompt in prompts]
            with_rivals = settings.tiny or (
                size[0] in _RIVAL_AGENTS and size[1:] == headline_size[1:]
            )
            with ExitStack() as stack:
                with console.status(f"{size[0]} agents: prefill, then steps in turn ..."):
                    arms = stack.enter_context(_our_arms(engines, prompts, num_steps))
                    if llama is not None and with_rivals:
                        arms |= stack.enter_context(_llamacpp_arms(llama, encoded, num_steps))
                    steps = {name: partial(_turn, arm.step) for name, arm in arms.items()}
                    seconds = in_turn(steps, num_turns)
                memory = {name: arm.memory for name, arm in arms.items()}
            if vllm is not None and with_rivals:
                with console.status(f"{size[0]} agents in vLLM ..."):
                    seconds["vllm"], kv_bytes = _time_vllm(vllm, encoder, encoded, num_steps)
                memory["vllm"] = _Memory(_checkpoint_bytes(settings.model), kv_bytes)
            table.add(*_rows(size, seconds, memory))
    return SuiteResult(
        "decode", settings.model, table.rows, _headline(table.rows, headline_size), notes
    )


def _turn(step: Callable[[], float]) -> float:
    """Seconds of a step: the median of some in a row, as an engine that serves takes them.

    The first does not count: another engine's threads may still spin, and the caches are its own.
    """
    return statistics.median([step() for _ in range(1 + _STEPS_A_TURN)][1:])


def _rows(
    size: Size, seconds: Mapping[str, list[float]], memory: Mapping[str, _Memory]
) -> list[Row]:
    agents, num_shared, num_own = size
    ours_s = statistics.median(seconds["collective"])
    rows = []
    for mode, steps_s in seconds.items():
        median = statistics.median(steps_s)
        rows.append(
            {
                "agents": agents,
                "shared": num_shared,
                "own": num_own,
                "mode": mode,
                "tokens_per_s": agents / median,
                "step_ms": 1000 * median,
                "min_ms": 1000 * min(steps_s),
                "max_ms": 1000 * max(steps_s),
                "vs_mode": median / ours_s,
                "weights_mib": memory[mode].weights / 2**20,
                "kv_mib": memory[mode].kv / 2**20,
            }
        )
    return rows


def _headline(rows: list[Row], headline_size: Size) -> dict[str, float | None]:
    """How much faster `collective` is; of llama.cpp with the fastest of its modes."""
    at_length = [row for row in rows if (row["shared"], row["own"]) == headline_size[1:]]
    times: dict[int, dict[str, float]] = {}
    for row in at_length:
        times.setdefault(row["agents"], {})[row["mode"]] = row["vs_mode"]
    of_headline = times.get(headline_size[0], {})
    headline = {f"speedup_vs_{mode}_32": of_headline.get(mode) for mode in ("dense", "vllm")}
    for agents in _RIVAL_AGENTS:
        for name, least in least_over_modes(times.get(agents, {})).items():
            headline[f"speedup_vs_{name}_{agents}"] = least
    return headline


def make_prompts(llm: LLM, agents: int, num_shared: int, num_own: int, seed: int) -> list[Prompt]:
    """Prompts of real text with exact lengths: own tokens, then shared ones, then a last own one.

    Each agent's own text is a shuffle of the example town's lines, and so is the shared text.
    """
    rng = random.Random(seed)
    lines = [line for person in read_people(TOWN) for line in person.system.split("\n")]

    def text(length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += llm.encoder.text_ids(" ".join(rng.sample(lines, len(lines)))).tolist()
        return ids[:length]

    return prompts_around(text(num_shared), [text(num_own) for _ in range(agents)])


@contextmanager
def _our_arms(
    engines: Mapping[str, LLM], prompts: list[Prompt], num_steps: int
) -> Iterator[dict[str, _Arm]]:
    """Our modes, their prompts computed."""
    rounds = {
        name: DecodingRound(engines[mode], prompts, num_steps) for mode, name in _NAMES.items()
    }
    arms = {}
    for mode, name in _NAMES.items():
        llm = engines[mode]
        num_pages = llm.kv_store.pool.num_held(Holder.REQUEST)
        memory = _Memory(weight_bytes(llm.model.module), num_pages * llm.engine.page_bytes)
        arms[name] = _Arm(rounds[name].step, memory)
    try:
        yield arms
    finally:
        for decoding in rounds.values():
            decoding.close()


@contextmanager
def _llamacpp_arms(
    llama: LlamaCpp, prompts: list[EncodedPrompt], num_steps: int
) -> Iterator[dict[str, _Arm]]:
    """The modes of llama.cpp, their prompts computed."""
    longest = max(map(len, prompts)) + num_steps + 8
    with ExitStack() as stack:
        arms = {}
        for mode in MODES:
            given = LlamaCppPrompts.of(prompts, mode)
            context = stack.enter_context(llama.open(mode, len(prompts), longest))
            context.prefill(given.token_ids, in_front=given.in_front)
            num_tokens = sum(map(len, prompts)) - (len(prompts) - 1) * given.in_front
            arms[str(mode)] = _Arm(
                lambda context=context: context.step()[0],  # type: ignore[misc]
                _Memory(llama.weight_bytes[mode.weights], num_tokens * context.kv_bytes),
            )
        yield arms


def _time_vllm(
    vllm: VLLM, llm: LLM, prompts: list[EncodedPrompt], num_steps: int
) -> tuple[list[float], int]:
    """Seconds per step of vLLM, its prefix cache filled, and bytes of the KV that it held.

    They are a long answer's time less a short one's. Both calls find the prompts in the cache, so
    what differs is the decoding.
    """
    ids = [prompt.token_ids.tolist() for prompt in prompts]
    vllm.reset()
    vllm.run(ids, 1)
    short = sorted(vllm.run(ids, 1).seconds for _ in range(3))
    answers = [vllm.run(ids, 1 + num_steps) for _ in range(3)]
    long = sorted(answer.seconds for answer in answers)
    steps_s = [(b - a) / num_steps for a, b in zip(short, long, strict=True)]
    num_tokens = vllm.block_size * max(answer.peak_blocks for answer in answers)
    return steps_s, num_tokens * llm.engine.kv_bytes_per_token


def _checkpoint_bytes(model: str) -> int:
    """Of the weights, as they lie in files."""
    files = Path(checkpoint_source(model)).glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw tokens per second by agents, at the longest shared run."""
    _, num_shared, num_own = max((row["agents"], row["shared"], row["own"]) for row in result.rows)
    rows = [row for row in result.rows if (row["shared"], row["own"]) == (num_shared, num_own)]
    title = f"Decoding, {num_shared} shared and {num_own} own tokens, {result.model}"
    draw_lines(
        path, rows, "mode", "agents", "tokens_per_s", title=title, y_label="tokens per second"
    )
