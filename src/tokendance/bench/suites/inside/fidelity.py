"""`fidelity --engine vllm`: how near answers are to plain vLLM's, beside the embedded engine.

Each engine answers as one that computes everything has: the same tokens are forced, and the
log-probabilities of the whole vocabulary compared (`fidelity/measure.py`). vLLM with TokenDance
inside is compared with plain vLLM, the embedded engine with itself without reuse; either once with
each block tagged, and once with what all have said as one block, as discovery finds it.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tokendance.bench.arms import DTYPES, load, make_engine
from tokendance.bench.inside import INSIDE, PLAIN, TAGGED, started_pair
from tokendance.bench.plots import draw_bars
from tokendance.bench.rivals import places_of_blocks, warm_vllm
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.vllm import VLLM, VLLMConfig
from tokendance.bench.workload import RoundWorkload, WorkloadSpec, write_texts
from tokendance.fidelity.compare import compare_logprobs
from tokendance.fidelity.measure import forced_reference, measure_fidelity
from tokendance.llm import LLM
from tokendance.rounds.prompts import Prompt, private, shared

_COLUMNS = {
    "dtype": "dtype",
    "seed": "seed",
    "mode": "engine",
    "mirrors": "mirrors",
    "kl_next": "KL next",
    "kl": "KL",
    "top1": "top-1",
}
_OURS_TAGGED, _OURS_ONE_BLOCK = "embedded, tagged", "embedded, one block"


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. `settings.repeats` is the number of workloads."""
    spec = WorkloadSpec(10, source=settings.source, seed=settings.seed)
    num_tokens = 16
    if settings.tiny:
        spec, num_tokens = replace(spec, agents=3, block_tokens=40, private_tokens=(40, 80)), 4
    longest = spec.private_tokens[1] + spec.agents * (spec.block_tokens + 30) + 400
    room = 3 * spec.agents * longest
    notes: list[str] = []
    rows: list[Row] = []
    rounds: list[RoundWorkload] = []
    for dtype in DTYPES[::-1]:
        model = load(settings, dtype)
        ours = make_engine(model, settings.engine, "collective", room)
        exact = make_engine(model, settings.engine, "none", room)
        if not rounds:  # both dtypes read the same
            seeds = range(spec.seed, spec.seed + settings.repeats)
            rounds = [write_texts(ours, replace(spec, seed=seed)).arrange() for seed in seeds]
        with started_pair(
            settings.model,
            console,
            model,
            notes,
            max_context=longest,
            num_tokens=2 * spec.agents * longest,
            config=VLLMConfig(max_logprobs=-1),
        ) as engines:
            table = LiveTable(console, f"Fidelity inside vLLM, {dtype}", _COLUMNS)
            for seed, workload in enumerate(rounds, spec.seed):
                with console.status(f"{dtype}, seed {seed} ..."):
                    figures = _measure(engines, ours, exact, workload, num_tokens)
                for mode, row in figures.items():
                    table.add({"dtype": dtype, "seed": seed, "mode": mode, **row})
            rows += table.rows
    headline: dict[str, float | None] = {
        f"{figure}_{name}": statistics.mean(
            row[figure] for row in rows if row["dtype"] == "float32" and row["mode"] == mode
        )
        for name, mode in (
            ("inside", INSIDE),
            ("inside_tagged", TAGGED),
            ("embedded", _OURS_ONE_BLOCK),
            ("embedded_tagged", _OURS_TAGGED),
        )
        for figure in ("kl_next", "kl", "top1")
    }
    notes.append("KL in nats, over the agents that reuse shared tokens.")
    return SuiteResult("fidelity", settings.model, rows, headline, notes)


def _measure(
    engines: Mapping[str, VLLM], ours: LLM, exact: LLM, workload: RoundWorkload, num_tokens: int
) -> dict[str, Row]:
    """Figures of one round, by engine; all are made to say what plain vLLM answers."""
    encoded = workload.encoded(ours)
    ids = [prompt.token_ids.tolist() for prompt in encoded]
    engines[PLAIN].reset()
    answers = engines[PLAIN].run(ids, num_tokens).token_ids
    places = [places_of_blocks(prompt) for prompt in encoded]
    expected: list[Tensor] = []
    figures: dict[str, Row] = {}
    for name, vllm, blocks in (
        (PLAIN, engines[PLAIN], None),
        (INSIDE, engines[INSIDE], None),
        (TAGGED, engines[INSIDE], places),
    ):
        warm_vllm(vllm, encoded)
        result, logprobs = vllm.score(ids, answers, blocks=blocks)
        if name == PLAIN:
            expected = logprobs
            continue
        mirrors = [
            index
            for index, cached in enumerate(result.cached_tokens)
            if cached > len(encoded[index].segments[0])
        ]
        figures[name] = _figures(expected, logprobs, mirrors)
    tagged = workload.prompts()
    one_block = [
        Prompt(
            [
                private(prompt.segments[0].token_ids.tolist()),
                shared(
                    [t for part in prompt.segments if part.shared for t in part.token_ids.tolist()]
                ),
                private(prompt.segments[-1].token_ids.tolist()),
            ],
            agent=view.name,
        )
        for prompt, view in zip(encoded, workload.views, strict=True)
    ]
    reference = forced_reference(exact, tagged, answers)
    for mode, prompts in ((_OURS_TAGGED, tagged), (_OURS_ONE_BLOCK, one_block)):
        workload.warm(ours)
        found = measure_fidelity(ours, prompts, reference)
        figures[mode] = {
            "mirrors": len(found.agents),
            "kl_next": found.kl_next,
            "kl": found.kl_continuation,
            "top1": found.top1,
        }
    return figures


def _figures(expected: Sequence[Tensor], found: Sequence[Tensor], mirrors: Sequence[int]) -> Row:
    compared = [compare_logprobs(expected[index], found[index]) for index in mirrors]
    return {
        "mirrors": len(mirrors),
        "kl_next": float(torch.stack([kl[0] for kl, _ in compared]).mean()),
        "kl": float(torch.cat([kl for kl, _ in compared]).mean()),
        "top1": float(torch.cat([same for _, same in compared]).mean()),
    }


def plot(result: SuiteResult, path: Path) -> None:
    """Draw KL by seed, a bar per engine, in float32."""
    rows = [row for row in result.rows if row["dtype"] == "float32"]
    title = f"Fidelity inside vLLM, {result.model}"
    draw_bars(path, rows, "mode", "seed", "kl", title=title, y_label="KL, nats")
