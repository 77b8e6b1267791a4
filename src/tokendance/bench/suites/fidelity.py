"""The fidelity suite: what reuse costs in the answers, and what correction buys back.

Every mode is compared with `none` in its own dtype, over the agents that reuse something
(`fidelity/measure.py`). The frontier, KL against corrected tokens, is measured in float32: bfloat16
rounds so coarsely that its own noise, which is what its row `all` shows, hides the differences.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from tokendance.bench.arms import load
from tokendance.bench.plots import plot_frontier
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.workload import (
    Order,
    RoundTexts,
    RoundWorkload,
    WorkloadSpec,
    write_texts,
)
from tokendance.collector.correction import (
    DEFAULT_CORRECTION,
    CorrectionPolicy,
    read_correction,
)
from tokendance.disk.kv_file import compress_rows, decompress_rows
from tokendance.fidelity.measure import Fidelity, Reference, measure_fidelity, reference_answers
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions, ReuseMode
from tokendance.params import SamplingParams
from tokendance.store.pages import Holder

RECALL_TOKENS = 6  # the word that is asked for comes first
COLUMNS = {
    "dtype": "dtype",
    "order": "order",
    "mode": "mode",
    "correction": "correction",
    "corrected": "corrected",
    "corrected_share": "share",
    "kl_next": "KL next",
    "kl": "KL",
    "kl_min": "smallest",
    "kl_max": "largest",
    "top1": "top-1",
    "identical": "identical",
    "recall": "recall",
    "recall_none": "of none",
}
_HEADLINE = {
    "kl": "kl",
    "kl_next": "kl_next",
    "top1": "top1",
    "identical": "identical",
    "recall": "recall",
    "corrected": "corrected",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to reuse.

    Attributes:
        mode: see `reuse` of `EngineOptions`.
        correction: of "collective"; None with the others.
        int8: private parts have been stored in a byte per number.
    """

    mode: ReuseMode
    correction: CorrectionPolicy | None
    int8: bool = False

    @property
    def label(self) -> str:
        """The correction as the table shows it."""
        if self.correction is None:
            return "-"
        return f"{self.correction.spec}, int8" if self.int8 else self.correction.spec


DEFAULT = Kind("collective", DEFAULT_CORRECTION)
INT8 = Kind("collective", DEFAULT_CORRECTION, int8=True)
PIC = Kind("pic", None)
_SWEEP = (
    *("none", "first:1", "first:2", "first:4", "first:8", "epic"),
    *("edges:0+1", "edges:2+1", "edges:3+1", "edges:8+1", "all"),
)


def _collective(*specs: str) -> tuple[Kind, ...]:
    return tuple(Kind("collective", read_correction(spec)) for spec in specs)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the suite measures.

    Attributes:
        spec: of the texts; the seed is the first of `workloads` seeds.
        workloads: how many.
        tokens: most tokens of a forced answer.
        frontier: kinds, measured in float32 in each of `orders`.
        orders: of the blocks.
        half: kinds, measured in bfloat16 in the order "same".
        engine: what all engines have in common.
    """

    spec: WorkloadSpec
    workloads: int
    tokens: int
    frontier: tuple[Kind, ...]
    orders: tuple[Order, ...]
    half: tuple[Kind, ...]
    engine: EngineOptions

    def options(self, model: LoadedModel) -> EngineOptions:
        """An engine with memory for a round and the questions after it, with nothing evicted."""
        longest = self.spec.private_tokens[1] + self.spec.agents * (self.spec.block_tokens + 30)
        num_tokens = 3 * self.spec.agents * (longest + 400)
        budget = num_tokens * model.shape.kv_bytes_per_token(model.dtype)
        return replace(self.engine, kv_budget=budget)


def _make_plan(settings: BenchSettings) -> _Plan:
    if settings.tiny:
        return _Plan(
            WorkloadSpec(3, 40, (40, 80), source=settings.source, seed=settings.seed),
            workloads=1,
            tokens=6,
            frontier=(PIC, DEFAULT, INT8, *_collective("all")),
            orders=("same", "permuted"),
            half=(DEFAULT,),
            engine=settings.engine,
        )
    return _Plan(
        WorkloadSpec(10, source=settings.source, seed=settings.seed),
        workloads=settings.repeats,
        tokens=32,
        frontier=(PIC, *_collective(*_SWEEP), INT8),
        orders=("same", "permuted", "own-first"),
        half=(PIC, *_collective("none", "first:4"), DEFAULT, INT8, *_collective("all")),
        engine=settings.engine,
    )


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure and print a table.

    Args:
        settings: `repeats` is the number of workloads, each of another seed.
        console: to print on.

    Returns:
        A row for each (dtype, order, mode, correction), over all workloads; in the headline, `pic`
        and `collective` with its default correction, in float32 and in one order for all.

    Raises:
        TokenDanceError: if the model cannot be loaded, or a prompt cannot be run.
    """
    plan = _make_plan(settings)
    table = LiveTable(console, "Fidelity against full computation", COLUMNS)
    rows: list[Row] = []
    texts: list[RoundTexts] = []
    for dtype, orders, kinds in (
        ("float32", plan.orders, plan.frontier),
        ("bfloat16", ("same",), plan.half),
    ):
        model = load(settings, dtype)
        if not texts:  # both dtypes read the same
            texts = _write(model, plan)
        for row in _rows(model, plan, texts, orders, kinds):
            rows.append({"dtype": dtype, **row})
            table.add(rows[-1])
    return SuiteResult(
        "fidelity",
        settings.model,
        rows,
        _headline(rows),
        [
            f"Over {plan.workloads} workloads of {plan.spec.agents} agents; smallest and largest "
            "are means of a workload.",
            "KL in nats over the forced greedy answer of `none`; all figures over the agents that "
            "reuse shared tokens.",
            "corrected: tokens that a mirror computes afresh; for pic those that it selects, not "
            "its first layer, which it computes for all shared tokens. pic-batched computes the "
            "same numbers as pic.",
        ],
    )


def plot(result: SuiteResult, path: Path) -> None:
    """Draw the frontier: KL against the share of corrected tokens."""
    plot_frontier(result, path)


def _write(model: LoadedModel, plan: _Plan) -> list[RoundTexts]:
    writer = LLM.from_loaded(model, replace(plan.options(model), reuse="prefix"))
    first = plan.spec.seed
    return [
        write_texts(writer, replace(plan.spec, seed=seed))
        for seed in range(first, first + plan.workloads)
    ]


@dataclass(frozen=True, slots=True)
class _Exact:
    """What full computation says of one workload.

    Attributes:
        workload: the round.
        answers: of its agents.
        recall: whether each agent's question was answered.
    """

    workload: RoundWorkload
    answers: list[Reference]
    recall: dict[str, bool]


def _rows(
    model: LoadedModel,
    plan: _Plan,
    texts: Sequence[RoundTexts],
    orders: Sequence[Order],
    kinds: Sequence[Kind],
) -> Iterator[Row]:
    """Measure each kind on all workloads in all orders, in one dtype."""
    exact: dict[Order, list[_Exact]] = {order: [] for order in orders}
    none = LLM.from_loaded(model, replace(plan.options(model), reuse="none"))
    # The same but for rounding, and the questions come after prompts that it has computed.
    asked = LLM.from_loaded(model, replace(plan.options(model), reuse="prefix"))
    for text in texts:
        for order in orders:
            workload = text.arrange(order)
            answers = reference_answers(none, workload.prompts(), plan.tokens)
            workload.warm(asked, keep=True)
            exact[order].append(_Exact(workload, answers, measure_recall(asked, workload)))
    del none, asked
    for kind in kinds:
        options = replace(plan.options(model), reuse=kind.mode, correction=kind.correction)
        llm = LLM.from_loaded(model, options)
        fidelity: dict[Order, list[Fidelity]] = {order: [] for order in orders}
        recall: dict[Order, list[float | None]] = {order: [] for order in orders}
        recall_none: dict[Order, list[float | None]] = {order: [] for order in orders}
        for index in range(len(texts)):
            for order in orders:
                expected = exact[order][index]
                workload = expected.workload
                # The orders of a workload have it in common.
                workload.warm(llm, keep=not kind.int8)
                if kind.int8:
                    pass_through_int8(llm)
                measured = measure_fidelity(llm, workload.prompts(), expected.answers)
                answered = measure_recall(llm, workload)
                fidelity[order].append(measured)
                recall[order].append(recall_share(answered, measured.agents))
                recall_none[order].append(recall_share(expected.recall, measured.agents))
        for order in orders:
            yield {
                "order": order,
                "mode": kind.mode,
                "correction": kind.label,
                **_summary(fidelity[order]),
                "recall": _mean(recall[order]),
                "recall_none": _mean(recall_none[order]),
            }


# -- what it measures besides -----------------------------------------------------------------


def pass_through_int8(llm: LLM) -> None:
    """Put all KV that an engine has stored through compression and back, as a cold store does."""
    pool = llm.kv_store.pool
    pages = np.flatnonzero(pool.num_refs(pool.all_pages(), Holder.INDEX))
    size = pool.page_size
    slots = (pages[:, None] * size + np.arange(size)).reshape(-1)
    slots = slots[llm.kv_store.slot_ready[slots]].astype(np.int32)
    rows = llm.executor.read_kv(slots)
    llm.executor.write_kv(slots, decompress_rows(rows.positions, compress_rows(rows)))


def measure_recall(llm: LLM, workload: RoundWorkload) -> dict[str, bool]:
    """Ask each agent what another one said.

    Right after `measure_fidelity` on the same engine the questions follow on the KV that the
    agents read there, and little is computed.

    Returns:
        For each agent that has a question, whether its greedy answer has the word asked for.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    prompts = workload.question_prompts(llm)
    if not prompts:
        return {}
    result = llm.run_round(prompts, SamplingParams(max_tokens=RECALL_TOKENS))
    result.raise_for_errors()
    return {
        output.agent: question.answered_by(output.text)
        for output, question in zip(result.outputs, workload.questions, strict=True)
    }


def recall_share(answered: dict[str, bool], agents: Sequence[str]) -> float | None:
    """Share of right answers among these agents; None if none of them was asked."""
    asked = [answered[name] for name in agents if name in answered]
    return statistics.mean(asked) if asked else None


# -- figures ----------------------------------------------------------------------------------


def _summary(measured: Sequence[Fidelity]) -> Row:
    """Means over workloads, and the spread of what matters most."""
    kl = [fidelity.kl_continuation for fidelity in measured]
    return {
        "corrected": statistics.mean(fidelity.corrected for fidelity in measured),
        "corrected_share": statistics.mean(fidelity.corrected_share for fidelity in measured),
        "kl_next": statistics.mean(fidelity.kl_next for fidelity in measured),
        "kl": statistics.mean(kl),
        "kl_min": min(kl),
        "kl_max": max(kl),
        "top1": statistics.mean(fidelity.top1 for fidelity in measured),
        "identical": statistics.mean(fidelity.identical for fidelity in measured),
        "mirrors": sum(len(fidelity.agents) for fidelity in measured),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None


def _headline(rows: Sequence[Row]) -> dict[str, float | None]:
    headline: dict[str, float | None] = {}
    for kind in (PIC, DEFAULT):
        row = _find(rows, kind)
        for name, key in _HEADLINE.items():
            headline[f"{name}_{kind.mode}"] = None if row is None else row[key]
    for name in ("kl", "kl_next"):
        above, below = headline[f"{name}_collective"], headline[f"{name}_pic"]
        headline[f"{name}_ratio"] = above / below if above is not None and below else None
    return headline


def _find(rows: Sequence[Row], kind: Kind) -> Row | None:
    wanted = {
        "dtype": "float32",
        "order": "same",
        "mode": kind.mode,
        "correction": kind.label,
    }
    return next((row for row in rows if wanted.items() <= row.items()), None)
