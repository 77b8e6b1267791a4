"""The fidelity suite: what reuse costs in the answers, and what correction buys back.

Every mode is compared with `none` in its own dtype, over the agents that reuse something
(`bench/fidelity.py`). The frontier, KL against corrected tokens, is measured in float32: bfloat16
rounds so coarsely that its own noise, which is what its row `all` shows, hides the differences.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tokendance.bench.fidelity import (
    Fidelity,
    Reference,
    measure_fidelity,
    measure_recall,
    recall_share,
    reference_answers,
)
from tokendance.bench.plots import plot_frontier
from tokendance.bench.suite import BenchSettings, LiveTable, Row, SuiteResult
from tokendance.bench.workload import (
    Order,
    RoundTexts,
    RoundWorkload,
    WorkloadSpec,
    write_texts,
)
from tokendance.collector.correction import (
    CorrectAll,
    CorrectionPolicy,
    Edges,
    FirstK,
    NoCorrection,
    make_correction,
)
from tokendance.config import EngineConfig, ReuseMode, StoreConfig
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, load_model

STORE = StoreConfig(2**31)
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
    "top1": "top1",
    "identical": "identical",
    "recall": "recall",
    "corrected": "corrected",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to reuse; `correction` has no effect but with "collective"."""

    mode: ReuseMode
    correction: CorrectionPolicy

    @property
    def label(self) -> str:
        """The correction as the table shows it; 2 + 1 is the first two and the last token."""
        if self.mode != "collective":
            return "-"
        if isinstance(self.correction, FirstK):
            return f"first {self.correction.k}"
        if isinstance(self.correction, Edges):
            return f"{self.correction.first} + {self.correction.last}"
        return self.correction.name


DEFAULT = Kind("collective", Edges())
PIC = Kind("pic", NoCorrection())


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
    """

    spec: WorkloadSpec
    workloads: int
    tokens: int
    frontier: tuple[Kind, ...]
    orders: tuple[Order, ...]
    half: tuple[Kind, ...]


def _make_plan(settings: BenchSettings) -> _Plan:
    if settings.tiny:
        return _Plan(
            WorkloadSpec(3, 40, (40, 80), seed=settings.seed),
            workloads=1,
            tokens=6,
            frontier=(PIC, DEFAULT, Kind("collective", CorrectAll())),
            orders=("same", "permuted"),
            half=(DEFAULT,),
        )
    sweep: list[CorrectionPolicy] = [NoCorrection()]
    sweep += [FirstK(1), FirstK(2), FirstK(4), FirstK(8), make_correction("epic")]
    sweep += [Edges(0, 1), Edges(2, 1), Edges(3, 1), Edges(8, 1), CorrectAll()]
    return _Plan(
        WorkloadSpec(10, seed=settings.seed),
        workloads=settings.repeats,
        tokens=32,
        frontier=(
            Kind("prefix", NoCorrection()),
            PIC,
            *(Kind("collective", policy) for policy in sweep),
        ),
        orders=("same", "permuted", "own-first"),
        half=(
            PIC,
            Kind("collective", NoCorrection()),
            DEFAULT,
            Kind("collective", Edges()),
            Kind("collective", CorrectAll()),
        ),
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
        model = load_model(settings.model, dtype)
        if not texts:  # both dtypes read the same
            texts = _write(model, plan)
        for order in orders:
            workloads = [text.arrange(order) for text in texts]
            for row in _rows(model, workloads, kinds, plan.tokens):
                rows.append({"dtype": dtype, "order": order, **row})
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
            "its first two layers, which it computes for all shared tokens.",
        ],
    )


def plot(result: SuiteResult, path: Path) -> None:
    """Draw the frontier: KL against the share of corrected tokens."""
    plot_frontier(result, path)


def _write(model: LoadedModel, plan: _Plan) -> list[RoundTexts]:
    writer = LLM.from_loaded(model, EngineConfig("prefix", store=STORE))
    first = plan.spec.seed
    return [
        write_texts(writer, replace(plan.spec, seed=seed))
        for seed in range(first, first + plan.workloads)
    ]


def _rows(
    model: LoadedModel, workloads: Sequence[RoundWorkload], kinds: Sequence[Kind], tokens: int
) -> Iterator[Row]:
    """Measure each kind on all workloads of one order, in one dtype."""
    exact = LLM.from_loaded(model, EngineConfig("none", store=STORE))
    # The same but for rounding, and the questions come after prompts that it has computed.
    asked = LLM.from_loaded(model, EngineConfig("prefix", store=STORE))
    references = [reference_answers(exact, one.prompts(), tokens) for one in workloads]
    recalls = [measure_recall(asked, one) for one in workloads]
    del exact, asked
    for kind in kinds:
        found = [
            _measure(model, kind, workload, reference)
            for workload, reference in zip(workloads, references, strict=True)
        ]
        yield {
            "mode": kind.mode,
            "correction": kind.label,
            **_summary([fidelity for fidelity, _ in found]),
            "recall": _mean(recall_share(answered, one.agents) for one, answered in found),
            "recall_none": _mean(
                recall_share(answered, one.agents)
                for (one, _), answered in zip(found, recalls, strict=True)
            ),
        }


def _measure(
    model: LoadedModel, kind: Kind, workload: RoundWorkload, reference: Sequence[Reference]
) -> tuple[Fidelity, dict[str, bool]]:
    llm = LLM.from_loaded(model, EngineConfig(kind.mode, kind.correction, store=STORE))
    fidelity = measure_fidelity(llm, workload.prompts(), reference)
    return fidelity, measure_recall(llm, workload)


def _summary(found: Sequence[Fidelity]) -> Row:
    """Means over workloads, and the spread of what matters most."""
    kl = [one.kl_continuation for one in found]
    return {
        "corrected": statistics.mean(one.corrected for one in found),
        "corrected_share": statistics.mean(one.corrected_share for one in found),
        "kl_next": statistics.mean(one.kl_next for one in found),
        "kl": statistics.mean(kl),
        "kl_min": min(kl),
        "kl_max": max(kl),
        "top1": statistics.mean(one.top1 for one in found),
        "identical": statistics.mean(one.identical for one in found),
        "mirrors": sum(len(one.agents) for one in found),
    }


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _headline(rows: Sequence[Row]) -> dict[str, float | None]:
    headline: dict[str, float | None] = {}
    for kind in (PIC, DEFAULT):
        row = _find(rows, kind)
        for name, key in _HEADLINE.items():
            headline[f"{name}_{kind.mode}"] = None if row is None else row[key]
    above, below = headline["kl_collective"], headline["kl_pic"]
    headline["kl_ratio"] = above / below if above is not None and below else None
    return headline


def _find(rows: Sequence[Row], kind: Kind) -> Row | None:
    wanted = {
        "dtype": "float32",
        "order": "same",
        "mode": kind.mode,
        "correction": kind.label,
    }
    return next((row for row in rows if wanted.items() <= row.items()), None)
