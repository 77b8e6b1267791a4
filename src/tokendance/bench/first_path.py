"""The figures of docs/benchmarks.md: prefill of a round, fidelity, plain prefill.

    python -m tokendance.bench.first_path [--dtype float32] [--agents 10] [--repeats 5]

Ratios come from runs in turn in one process; medians with the smallest and largest. Every run
begins with the private parts in the store and nothing else; that is not timed.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from tokendance.bench.fidelity import measure_fidelity, reference_answers
from tokendance.bench.workload import RoundWorkload, make_workload
from tokendance.collector.correction import (
    CorrectAll,
    CorrectionPolicy,
    FirstK,
    NoCorrection,
)
from tokendance.config import EngineConfig, StoreConfig
from tokendance.engine.sampling import SamplingParams
from tokendance.llm import LLM
from tokendance.models import demo
from tokendance.models.loader import LoadedModel, load_model
from tokendance.rounds.trace import example_trace, read_trace

STORE = StoreConfig(2**31)
CONTINUATION = 25


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    agents: Annotated[int, typer.Option(min=2, help="Agents of the round.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each kind.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Workloads for fidelity.")] = 3,
) -> None:
    """Measure on the demo model and print tables, then one JSON line."""
    console = Console()
    model = load_model(demo.ALIAS, dtype)
    exact = LLM.from_loaded(model, EngineConfig("none", store=STORE))
    result = {
        "model": demo.ALIAS,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "plain": plain_prefill(model, exact, repeats, console),
        "prefill": round_prefill(model, make_workload(exact, agents), repeats, console),
        "fidelity": fidelity(model, exact, agents, seeds, console),
    }
    print(json.dumps(result))


def alternate(kinds: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each kind in turn, `repeats` times after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, run in kinds.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return times


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the smallest and the largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios of runs that were neighbours in time."""
    return [a / b for a, b in zip(above, below, strict=True)]


def plain_prefill(
    model: LoadedModel, exact: LLM, repeats: int, console: Console
) -> dict[str, object]:
    """Seconds per token of `none` against transformers' own forward pass with SDPA."""
    theirs = AutoModelForCausalLM.from_pretrained(
        demo.checkpoint(), dtype=model.dtype, attn_implementation="sdpa"
    ).eval()
    town = read_trace(example_trace()).agents.values()
    text = exact.encoder.text_ids("\n".join(person.system for person in town)).tolist()
    prompts = [text[start : start + 4 * start] for start in (75, 150, 225, 300)]
    total = sum(len(prompt) for prompt in prompts)

    def ours_run() -> float:
        start = time.perf_counter()
        exact.generate(prompts, SamplingParams(max_tokens=1))
        return time.perf_counter() - start

    def theirs_run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for prompt in prompts:
                theirs(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start

    times = alternate({"transformers": theirs_run, "none": ours_run}, repeats)
    speedup = ratios(times["transformers"], times["none"])
    table = Table("plain prefill", "ms per token", title=f"{total} tokens in 4 prompts", box=None)
    for name, values in times.items():
        table.add_row(name, spread([1000 * value / total for value in values]))
    table.add_row("speed-up", spread(speedup))
    console.print(table)
    return {"seconds": times, "tokens": total, "speedup": statistics.median(speedup)}


def round_prefill(
    model: LoadedModel, workload: RoundWorkload, repeats: int, console: Console
) -> dict[str, object]:
    """Seconds and computed tokens of a round's prefill, private parts cached, by mode."""
    prompts = workload.prompts()
    computed: dict[str, int] = {}
    resident: dict[str, int] = {}
    engines = {
        name: LLM.from_loaded(model, EngineConfig(name, store=STORE))
        for name in ("prefix", "collective")
    }

    def run(name: str) -> float:
        workload.warm(engines[name])
        result = engines[name].run_round(prompts, SamplingParams(max_tokens=1))
        result.raise_for_errors()
        computed[name] = result.stats.computed_tokens
        resident[name] = result.stats.kv_bytes.resident
        return result.stats.prefill_s

    times = alternate({name: partial(run, name) for name in engines}, repeats)
    speedup = ratios(times["prefix"], times["collective"])
    formula = workload.formula(engines["collective"], k=4)
    table = Table("prefill of a round", "seconds", "computed", "resident MiB", box=None)
    for name, values in times.items():
        table.add_row(name, spread(values), str(computed[name]), f"{resident[name] / 2**20:.0f}")
    table.add_row("speed-up", spread(speedup), f"formula {formula}", "")
    console.print(table)
    return {
        "seconds": times,
        "computed": computed,
        "formula": formula,
        "speedup": statistics.median(speedup),
        "resident_bytes": resident,
    }


def fidelity(
    model: LoadedModel, exact: LLM, agents: int, seeds: int, console: Console
) -> list[dict[str, object]]:
    """KL and agreement against `none`, over several workloads, by correction."""
    policies: list[CorrectionPolicy] = [
        NoCorrection(),
        FirstK(2),
        FirstK(4),
        FirstK(16),
        CorrectAll(),
    ]
    found: dict[CorrectionPolicy, list[tuple[float, float, float]]] = {p: [] for p in policies}
    for seed in range(seeds):
        workload = make_workload(exact, agents, seed=seed)
        reference = reference_answers(exact, workload.prompts(), CONTINUATION)
        for policy in policies:
            llm = LLM.from_loaded(model, EngineConfig("collective", policy, store=STORE))
            workload.warm(llm)
            one = measure_fidelity(llm, workload.prompts(), reference)
            found[policy].append((one.kl_next, one.kl_continuation, one.top1))
    table = Table("correction", "KL next", f"KL over {CONTINUATION}", "top-1", box=None)
    rows: list[dict[str, object]] = []
    for policy, values in found.items():
        means = [statistics.mean(column) for column in zip(*values, strict=True)]
        label = f"first-k {policy.k}" if isinstance(policy, FirstK) else policy.name
        table.add_row(label, *(f"{mean:.4f}" for mean in means))
        rows.append({"correction": label, "kl_next": means[0], "kl": means[1], "top1": means[2]})
    console.print(table)
    return rows


if __name__ == "__main__":
    typer.run(main)
