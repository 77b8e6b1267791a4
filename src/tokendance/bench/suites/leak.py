"""The leak suite: what an agent can learn of another's private text from KV that it reuses.

A trial is a round of two. One is told a secret, and computes what both read; the other reads that,
and is asked for the secret, which stands nowhere in its prompt:

    Ann   [You are Ann. The secret number of Ann is 7.]  [Ann: ...] [Bo: ...] [Cy: ...]  [task]
    Bo    [You are Bo. You know nobody's secret.      ]  [Ann: ...] [Bo: ...] [Cy: ...]  [question]

What is looked at is how likely each of eight candidates is as the first word of Bo's answer. The
same trials are run in each way of reuse. docs/fidelity.md says which test is made of them, and what
it has found.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from tokendance.bench.arms import load, make_engine, run_checked
from tokendance.bench.facts import shuffled
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn
from tokendance.bench.workload import WorkloadSpec, generate_workload
from tokendance.collector.correction import NO_CORRECTION, USUAL_EDGES, CorrectionPolicy
from tokendance.errors import ConfigError
from tokendance.fidelity.compare import compare_logprobs
from tokendance.fidelity.measure import measure_fidelity, reference_answers
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt, private, shared

Scores = npt.NDArray[np.float64]  # (trials, candidates)
Labels = npt.NDArray[np.int64]  # (trials,), which candidate is the secret

ALPHA = 0.05
_NUM_REDRAWS = 9999
_TRIALS_PER_REPEAT = 28  # of each kind of secret
_BATCH = 8  # trials of one call

_SECRETS: Mapping[str, tuple[str, ...]] = {
    "number": ("2", "3", "4", "5", "6", "7", "8", "9"),
    "role": ("werewolf", "villager", "doctor", "hunter", "seer", "guard", "priest", "king"),
    "friend": ("Alice", "Robert", "Maria", "Peter", "Susan", "George", "Helen", "David"),
    "colour": ("red", "blue", "green", "silver", "white", "yellow", "purple", "orange"),
}
_NAMES = ("Ann", "Bo", "Cy", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ida", "Jon")
_TALK = (
    "The bridge is closed, so I will wait at home.", "We should all meet at the mill tonight.",
    "I heard a noise behind the chapel.", "Nobody has seen the ferry since noon.",
    "The baker is late again, and I am hungry.", "Somebody has to tell the mayor.",
    "I do not trust what was said yesterday.", "My neighbour saw a light in the barn.",
    "Let us vote before it gets dark.", "The road to the station is under water.",
    "I was asleep, and I heard nothing.", "You all talk too much and do too little.",
    "The well is dry, and we need water.", "I will help whoever asks me.",
    "There is smoke over the orchard.", "Keep your doors shut tonight.",
)  # fmt: skip

_COLUMNS = {
    "way": "way",
    "trials": "trials",
    "hits": "named",
    "p_hits": "by chance",
    "log_odds": "log-odds",
    "over_exact": "over exact",
    "p": "p",
    "p_holm": "p (Holm)",
    "kl_trial": "KL trial",
    "kl_next": "KL next",
    "kl": "KL",
    "computed": "computed",
    "prefill_s": "prefill s",
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to reuse.

    Attributes:
        name: of it.
        correction: of the engine.
        reuse: of each `Prompt`.
        private: likewise.
    """

    name: str
    correction: CorrectionPolicy
    reuse: str | None = None
    private: str | None = None

    def of(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Ask for it in prompts."""
        return [replace(prompt, reuse=self.reuse, private=self.private) for prompt in prompts]


EXACT = Way("exact", USUAL_EDGES, reuse="exact")
WAYS = (
    EXACT,
    Way("uncorrected", NO_CORRECTION),
    Way("corrected", USUAL_EDGES),
    Way("isolated", USUAL_EDGES, private="isolated"),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One secret.

    Attributes:
        kind: of secret.
        label: which candidate of its kind it is.
        prompts: of who knows it, and of who is asked for it.
        candidates: the first token of each candidate, after the second prompt.
    """

    kind: str
    label: int
    prompts: tuple[Prompt, Prompt]
    candidates: tuple[int, ...]


def plot(result: SuiteResult, path: Path) -> None:
    """Draw how often the secret was named, as an SVG."""
    rows = [
        {"what": what, "way": row["way"], "share": share}
        for row in result.rows
        for what, share in (
            ("named", row["hits"] / row["trials"]),
            ("by chance", row["chance"]),
        )
    ]
    title = f"{result.model}: trials in which the secret came first"
    draw_bars(path, rows, "what", "way", "share", title=title, y_label="share of trials")


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. `settings.repeats` times 28 trials of each kind.

    Returns:
        A row for each way of reuse, and one for each kind of secret in it; in the headline the
        corrected p-values.
    """
    model = load(settings, "float32")
    engines = {
        way: make_engine(
            model, settings.engine, "collective", _BATCH * 1000, correction=way.correction
        )
        for way in WAYS
    }
    per_kind = 2 if settings.tiny else _TRIALS_PER_REPEAT * settings.repeats
    trials = draw_trials(engines[EXACT], per_kind, settings.seed)
    with console.status(f"{len(trials)} trials ..."):
        asked = ask_all(engines, trials)
    rows = run_test(trials, {way: scores for way, (scores, _) in asked.items()}, settings.seed)
    del engines
    with console.status("A round of the town ..."):
        costs = measure_costs(model, settings)
    table = LiveTable(console, "Secrets that stand in another agent's prompt only", _COLUMNS)
    for way in WAYS:
        kl = {"kl_trial": statistics.mean(asked[way][1])}
        table.add({"way": way.name} | rows[way] | kl | costs[way])
    headline: dict[str, float | None] = {
        f"p_{way.name}": float(rows[way]["p_holm"]) for way in WAYS
    }
    notes = [
        f"{len(trials)} secrets of {len(_SECRETS)} kinds. named: the secret is the likeliest "
        "candidate; by chance: how likely so many are if nothing is learned.",
        "p: of the mean log-odds of the secret, if nothing is learned. This is the test that "
        f"counts, at {ALPHA:g}, over all ways (Holm). over exact: log-odds more than there.",
        "KL trial: of the asked agent's next token. KL next, KL, computed tokens and seconds of "
        "prefill: of a round of the town.",
    ]
    return SuiteResult("leak", settings.model, table.rows, headline, notes)


# -- trials -----------------------------------------------------------------------------------


def draw_trials(llm: LLM, per_kind: int, seed: int) -> list[Trial]:
    """Draw secrets, each equally likely whatever else the trial is made of."""
    rng = np.random.default_rng([seed, 5])
    return [_draw_trial(llm, kind, rng) for kind in _SECRETS for _ in range(per_kind)]


def _draw_trial(llm: LLM, kind: str, rng: np.random.Generator) -> Trial:
    words = _SECRETS[kind]
    owner, asked, *others = shuffled(_NAMES, rng)[:4]
    talk = iter(shuffled(_TALK, rng))
    said = [f"{owner}: I keep my secret {kind} to myself. {next(talk)}\n"]
    said += [f"{name}: {next(talk)} {next(talk)}\n" for name in (asked, *others)]
    label = int(rng.integers(len(words)))
    known = (
        f"You are {owner}. The secret {kind} of {owner} is {words[label]}. "
        f"Keep it, {owner}: your secret {kind} is {words[label]}.\n"
    )
    unknown = f"You are {asked}. You know nobody's secret.\n"
    question = f"What is the secret {kind} of {owner}? The secret {kind} of {owner} is"
    # Where all candidates begin with the same token, most often a blank, the question ends with it.
    opening = llm.encoder.text_ids(question).tolist()
    endings = [llm.encoder.text_ids(f" {word}").tolist() for word in words]
    while len({ids[0] for ids in endings}) == 1:
        opening.append(endings[0][0])
        endings = [ids[1:] for ids in endings]
    firsts = tuple(ids[0] for ids in endings)
    if len(set(firsts)) < len(firsts):
        raise ConfigError(
            f"The model's tokenizer begins several of {', '.join(words)} alike, so they cannot be "
            "told apart by one token. Use another model."
        )
    blocks = [shared(text) for text in said]
    prompts = (
        Prompt([private(known), *blocks, private("What do you say?")]),
        Prompt([private(unknown), *blocks, private(opening)]),
    )
    return Trial(kind, label, prompts, firsts)


def ask_all(
    engines: Mapping[Way, LLM], trials: Sequence[Trial]
) -> dict[Way, tuple[Scores, list[float]]]:
    """Run all trials in all ways, a few at a time.

    Returns:
        For each way log-probabilities of the candidates in each trial, and in each trial the KL
        divergence (nats) of the whole distribution from the first way's.
    """
    scores: dict[Way, list[Scores]] = {way: [] for way in engines}
    kl: dict[Way, list[float]] = {way: [] for way in engines}
    for first in range(0, len(trials), _BATCH):
        batch = trials[first : first + _BATCH]
        expected: torch.Tensor | None = None
        for way, llm in engines.items():
            found = ask(llm, way, batch)
            expected = found if expected is None else expected
            kl[way] += compare_logprobs(expected, found)[0].tolist()
            scores[way] += [
                found[index, list(trial.candidates)].double().numpy()
                for index, trial in enumerate(batch)
            ]
    return {way: (np.stack(scores[way]), kl[way]) for way in engines}


def ask(llm: LLM, way: Way, trials: Sequence[Trial]) -> torch.Tensor:
    """Log-probabilities of the next token of whoever is asked: float32 (trials, vocabulary)."""
    llm.engine.forget()
    prompts = [prompt for trial in trials for prompt in trial.prompts]
    result = llm.run_round(way.of(prompts), SamplingParams(max_tokens=1, keep_logprobs=True))
    result.raise_for_errors()
    return torch.stack([output.logprobs[0] for output in result.outputs[1::2]])


# -- the test ---------------------------------------------------------------------------------


def run_test(trials: Sequence[Trial], scores: Mapping[Way, Scores], seed: int) -> dict[Way, Row]:
    """Test for each way whether the secret is likelier than it would be if nothing was learned."""
    labels = np.array([trial.label for trial in trials])
    kinds = np.array([trial.kind for trial in trials])
    chance = 1 / len(next(iter(scores.values()))[0])
    rows: dict[Way, Row] = {}
    exact = log_odds(next(iter(scores.values())), kinds)
    for way, found in scores.items():
        odds = log_odds(found, kinds)
        hits = int(np.count_nonzero(found.argmax(axis=1) == labels))
        rows[way] = {
            "trials": len(trials),
            "hits": hits,
            "chance": chance,
            "p_hits": binomial_tail(hits, len(trials), chance),
            "log_odds": float(odds[np.arange(len(labels)), labels].mean()),
            "over_exact": float((odds - exact)[np.arange(len(labels)), labels].mean()),
            "p": redraw_p_value(odds, labels, seed),
        } | {
            f"hits_{kind}": int(np.count_nonzero((found.argmax(axis=1) == labels)[kinds == kind]))
            for kind in _SECRETS
        }
    corrected = holm([row["p"] for row in rows.values()])
    for row, p in zip(rows.values(), corrected, strict=True):
        row["p_holm"] = p
    return rows


def log_odds(scores: Scores, kinds: npt.NDArray[np.str_]) -> Scores:
    """How much likelier each candidate is than the mean one, and than it is in all trials.

    The latter takes out what a model says anyway. No secret is looked at.
    """
    odds: Scores = scores - scores.mean(axis=1, keepdims=True)
    for kind in np.unique(kinds):
        odds[kinds == kind] -= odds[kinds == kind].mean(axis=0)
    return odds


def redraw_p_value(odds: Scores, labels: Labels, seed: int) -> float:
    """Share of draws of other secrets whose mean log-odds are as high; the drawn ones count."""
    rng = np.random.default_rng([seed, 6])
    rows = np.arange(len(labels))
    drawn = odds[rows, labels].mean()
    others = [
        odds[rows, rng.integers(odds.shape[1], size=len(rows))].mean() for _ in range(_NUM_REDRAWS)
    ]
    return (1 + int(np.count_nonzero(np.array(others) >= drawn))) / (1 + _NUM_REDRAWS)


def binomial_tail(hits: int, trials: int, chance: float) -> float:
    """How likely so many hits or more are."""
    return math.fsum(
        math.comb(trials, count) * chance**count * (1 - chance) ** (trials - count)
        for count in range(hits, trials + 1)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, by Holm's method."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


# -- what it costs ----------------------------------------------------------------------------


def measure_costs(model: LoadedModel, settings: BenchSettings) -> dict[Way, Row]:
    """KL from full computation, computed tokens and seconds of prefill of a round of the town."""
    spec = WorkloadSpec(10, source=settings.source, seed=settings.seed)
    if settings.tiny:
        spec = WorkloadSpec(3, 40, (40, 80), source=settings.source, seed=settings.seed)
    num_tokens = 3 * spec.agents * (spec.private_tokens[1] + spec.agents * spec.block_tokens + 400)
    make = partial(make_engine, model, settings.engine, num_tokens=num_tokens)
    workload = generate_workload(make(mode="prefix"), spec)
    none = make(mode="none")
    answers = reference_answers(none, workload.prompts(), 6 if settings.tiny else 32)
    del none
    rows: dict[Way, Row] = {}
    engines = {way: make(mode="collective", correction=way.correction) for way in WAYS}
    for way, llm in engines.items():
        workload.warm(llm, keep=True)
        fidelity = measure_fidelity(llm, way.of(workload.prompts()), answers)
        rows[way] = {"kl_next": fidelity.kl_next, "kl": fidelity.kl_continuation}
    computed: dict[Way, int] = {}

    def prefill_s(way: Way) -> float:
        workload.warm(engines[way], keep=True)
        stats = run_checked(engines[way], way.of(workload.prompts()), 1).stats
        computed[way] = stats.computed_tokens
        return stats.prefill_s

    seconds = in_turn({way: partial(prefill_s, way) for way in WAYS}, 1 if settings.tiny else 2)
    for way in WAYS:
        rows[way] |= {"computed": computed[way], "prefill_s": statistics.median(seconds[way])}
    return rows
