"""The fidelity suite: what reuse costs in the answers, and what correction buys back.

Every mode is compared with `none` in its own dtype, over the agents that reuse something
(`fidelity/measure.py`). The frontier, KL against corrected tokens, is measured in float32: bfloat16
rounds so coarsely that its own noise, which is what its row `all` shows, hides the differences.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console

from tokendance.bench.arms import load, make_engine
from tokendance.bench.plots import plot_frontier
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.workload import Order, RoundTexts, RoundWorkload, WorkloadSpec, write_texts
from tokendance.collector.correction import DEFAULT_CORRECTION
from tokendance.disk.kv_file import compress_rows, decompress_rows
from tokendance.fidelity.measure import Fidelity, Reference, measure_fidelity, reference_answers
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions, ReuseMode
from tokendance.params import SamplingParams
from tokendance.store.pages import Holder

RECALL_TOKENS = 6  # the word that is asked for comes first
DISTANCES = {
    "kl_next": "KL next",
    "kl": "KL",
    "kl_min": "smallest",
    "kl_max": "largest",
    "top1": "top-1",
    "identical": "identical",
}
_COLUMNS = {
    "dtype": "dtype",
    "order": "order",
    "mode": "mode",
    "correction": "correction",
    "corrected": "corrected",
    "corrected_share": "share",
    **DISTANCES,
    "recall": "recall",
    "recall_none": "of none",
}
_HEADLINE = ("kl", "kl_next", "top1", "identical", "recall", "corrected")


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to reuse."""

    mode: ReuseMode  # see `reuse` of `EngineOptions`
    correction: str | None  # of "collective"; None with the others
    int8: bool = False  # private parts have been stored in a byte per number

    @property
    def label(self) -> str:
        """The correction as the table shows it."""
        if self.correction is None:
            return "-"
        return f"{self.correction}, int8" if self.int8 else self.correction


DEFAULT = Kind("collective", DEFAULT_CORRECTION)
INT8 = Kind("collective", DEFAULT_CORRECTION, int8=True)
PIC = Kind("pic", None)
_SWEEP = (
    *("none", "first:1", "first:2", "first:4", "first:8", "first:16"),
    *("edges:0+1", "edges:2+1", "edges:3+1", "edges:8+1", DEFAULT_CORRECTION, "all"),
)


def _collective(*specs: str) -> tuple[Kind, ...]:
    return tuple(Kind("collective", spec) for spec in specs)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the suite measures."""

    spec: WorkloadSpec  # of the texts; the seed is the first of `workloads` seeds
    workloads: int
    tokens: int  # most tokens of a forced answer
    frontier: tuple[Kind, ...]  # kinds, measured in float32 in each of `orders`
    orders: tuple[Order, ...]  # of the blocks
    half: tuple[Kind, ...]  # kinds, measured in bfloat16 in the order "same"
    engine: EngineOptions  # what all engines have in common

    def make_engine(
        self, model: LoadedModel, mode: ReuseMode, correction: str | None = None
    ) -> LLM:
        """An engine with memory for a round and the questions after it, with nothing evicted."""
        longest = self.spec.private_tokens[1] + self.spec.agents * (self.spec.block_tokens + 30)
        num_tokens = 3 * self.spec.agents * (longest + 400)
        return make_engine(model, self.engine, mode, num_tokens, correction=correction)


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


plot = plot_frontier


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. `settings.repeats` is the number of workloads.

    Returns:
        A row for each (dtype, order, mode, correction), over all workloads; in the headline, `pic`
        and `collective` with its default correction, in float32 and in one order for all.
    """
    plan = _make_plan(settings)
    table = LiveTable(console, "Fidelity against full computation", _COLUMNS)
    texts: list[RoundTexts] = []
    for dtype, orders, kinds in (
        ("float32", plan.orders, plan.frontier),
        ("bfloat16", ("same",), plan.half),
    ):
        model = load(settings, dtype)
        if not texts:  # both dtypes read the same
            writer, first = plan.make_engine(model, "prefix"), plan.spec.seed
            specs = [replace(plan.spec, seed=first + number) for number in range(plan.workloads)]
            texts = [write_texts(writer, spec) for spec in specs]
            del writer
        for row in _rows(model, plan, texts, orders, kinds):
            table.add({"dtype": dtype, **row})
    notes = [
        f"Over {plan.workloads} workloads of {plan.spec.agents} agents; smallest and largest are "
        "means of a workload.",
        "KL in nats over the forced greedy answer of `none`; all figures over the agents that "
        "reuse shared tokens.",
        "corrected: tokens that a mirror computes afresh; for pic those that it selects, not its "
        "first layer, which it computes for all shared tokens. pic-batched computes the same "
        "numbers as pic.",
    ]
    return SuiteResult("fidelity", settings.model, table.rows, _headline(table.rows), notes)


@dataclass(frozen=True, slots=True)
class _Exact:
    """What full computation says of one workload in one order."""

    order: Order  # of the blocks
    workload: RoundWorkload
    answers: list[Reference]  # of its agents
    recall: dict[str, bool]  # whether each agent's question was answered


@dataclass(frozen=True, slots=True)
class _Measured:
    """One kind on one workload; the shares of right answers are over its mirrors, None if none."""

    fidelity: Fidelity
    recall: float | None
    recall_none: float | None


def _rows(
    model: LoadedModel,
    plan: _Plan,
    texts: Sequence[RoundTexts],
    orders: Sequence[Order],
    kinds: Sequence[Kind],
) -> Iterator[Row]:
    """Measure each kind on all workloads in all orders, in one dtype."""
    none = plan.make_engine(model, "none")
    # The same but for rounding, and the questions come after prompts that it has computed.
    asked = plan.make_engine(model, "prefix")
    exact: list[_Exact] = []
    for text in texts:
        for order in orders:
            workload = text.arrange(order)
            answers = reference_answers(none, workload.prompts(), plan.tokens)
            workload.warm(asked, keep=True)
            exact.append(_Exact(order, workload, answers, measure_recall(asked, workload)))
    del none, asked
    for kind in kinds:
        llm = plan.make_engine(model, kind.mode, kind.correction)
        measured: dict[Order, list[_Measured]] = {order: [] for order in orders}
        for expected in exact:
            # The orders of a workload have the private parts in common.
            expected.workload.warm(llm, keep=not kind.int8)
            if kind.int8:
                pass_through_int8(llm)
            measured[expected.order].append(_measure(llm, expected))
        for order in orders:
            yield {
                "order": order,
                "mode": kind.mode,
                "correction": kind.label,
                **_summary(measured[order]),
            }


def _measure(llm: LLM, expected: _Exact) -> _Measured:
    fidelity = measure_fidelity(llm, expected.workload.prompts(), expected.answers)
    answered = measure_recall(llm, expected.workload)
    agents = fidelity.agents
    return _Measured(
        fidelity, _recall_share(answered, agents), _recall_share(expected.recall, agents)
    )


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


def _recall_share(answered: dict[str, bool], agents: Sequence[str]) -> float | None:
    """Share of right answers among these agents; None if none of them was asked."""
    return _mean([answered[name] for name in agents if name in answered])


# -- figures ----------------------------------------------------------------------------------


def _summary(measured: Sequence[_Measured]) -> Row:
    of_workloads = [of_workload.fidelity for of_workload in measured]
    return {
        **summary_of(of_workloads),
        "mirrors": sum(len(fidelity.agents) for fidelity in of_workloads),
        "recall": _mean([of_workload.recall for of_workload in measured]),
        "recall_none": _mean([of_workload.recall_none for of_workload in measured]),
    }


def summary_of(of_workloads: Sequence[Fidelity]) -> Row:
    """Means over workloads, and the spread of what matters most."""
    kl = [fidelity.kl_continuation for fidelity in of_workloads]
    return {
        "corrected": statistics.mean(fidelity.corrected for fidelity in of_workloads),
        "corrected_share": statistics.mean(fidelity.corrected_share for fidelity in of_workloads),
        "kl_next": statistics.mean(fidelity.kl_next for fidelity in of_workloads),
        "kl": statistics.mean(kl),
        "kl_min": min(kl),
        "kl_max": max(kl),
        "top1": statistics.mean(fidelity.top1 for fidelity in of_workloads),
        "identical": statistics.mean(fidelity.identical for fidelity in of_workloads),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are; None if there are none."""
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None


def _headline(rows: Sequence[Row]) -> dict[str, float | None]:
    by_kind = {
        (row["mode"], row["correction"]): row
        for row in rows
        if (row["dtype"], row["order"]) == ("float32", "same")
    }
    headline: dict[str, float | None] = {
        f"{name}_{kind.mode}": by_kind.get((kind.mode, kind.label), {}).get(name)
        for kind in (PIC, DEFAULT)
        for name in _HEADLINE
    }
    for name in ("kl", "kl_next"):
        above, below = headline[f"{name}_collective"], headline[f"{name}_pic"]
        headline[f"{name}_ratio"] = above / below if above is not None and below else None
    return headline
