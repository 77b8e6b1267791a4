"""`serve`: what the way over HTTP costs, where nobody says what is shared.

Three things are measured on one model in one process, in turn:

    rounds    agents that talk for three rounds: as `LLM.run_round`, which is told what is shared,
              and as chat requests sent together, in which the server has to find it
    lone      one request at a time, by `LLM.generate` and by HTTP: what the server's window costs
              those who have nobody to share with
    burst     many requests at once: all have to be answered

What agents have said is given, so both ways read the same; their answers are made and thrown away.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from tokendance.bench.arms import answer_params, load, make_engines, run_checked, wall_seconds
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn, ratio, spread
from tokendance.bench.workload import NEWS, TASK, RoundTexts, WorkloadSpec, write_texts
from tokendance.llm import LLM
from tokendance.rounds.prompts import Message, Part, Prompt, private, shared
from tokendance.server.app import create_app
from tokendance.server.background import served
from tokendance.server.settings import ServerSettings

_COLUMNS = {
    "what": "what",
    "agents": "agents",
    "over": "over",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "speed": "speed",
    "computed": "computed",
    "reused": "reused",
}
_LIBRARY, _HTTP = "library", "HTTP"
_NAME = "bench"
_KEYS = tuple(f"tenant-{number}" for number in range(64))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured.

    Attributes:
        spec: of a conversation's people and of what they say in a round.
        rounds: of a conversation.
        answer_tokens: of every answer.
        burst: requests at once.
        lone_turns: lone requests of each kind.
    """

    spec: WorkloadSpec
    rounds: int
    answer_tokens: int
    burst: int
    lone_turns: int


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    if settings.tiny:
        spec = WorkloadSpec(3, 60, (20, 40), source=settings.source, seed=settings.seed)
        plan = _Plan(spec, rounds=2, answer_tokens=4, burst=8, lone_turns=2)
    else:
        spec = WorkloadSpec(10, private_tokens=(100, 500), source=settings.source)
        plan = _Plan(spec, rounds=3, answer_tokens=32, burst=128, lone_turns=40)
    model = load(settings)
    room = _room(plan)
    library, over_http = (
        make_engines(model, settings.engine, ["collective"], room)["collective"] for _ in range(2)
    )
    app = create_app(
        over_http,
        ServerSettings(
            served_name=_NAME, api_keys=_KEYS, max_open_requests=max(256, 2 * plan.burst)
        ),
    )
    table = LiveTable(console, "the library, and the same over HTTP", _COLUMNS)
    rows: list[Row] = []
    with console.status("The people of the rounds write ..."):
        conversation = _write(library, plan, settings.seed)
    with served(app) as (port, _):
        client = _Client(f"http://127.0.0.1:{port}")
        for new in (
            partial(_rounds, plan, conversation, library, client, settings.repeats),
            partial(_lone, plan, conversation, library, client),
            partial(_burst, plan, conversation, library, client),
        ):
            for row in new():
                rows.append(row)
                table.add(row)
    found = {(row["what"], row["over"]): row for row in rows}
    headline: dict[str, float | None] = {
        "round_speed": found["all rounds", _HTTP]["speed"],
        "lone_latency": 1 / found["lone", _HTTP]["speed"],
        "burst_answered": found["burst", _HTTP]["answered"],
    }
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    notes.append(
        "speed: of the library's, the median of runs in turn. Answers have "
        f"{plan.answer_tokens} tokens. What the model reads over HTTP is what the library was "
        "given, as plain text in chat messages; nothing says what of it is shared."
    )
    return SuiteResult("serve", settings.model, rows, headline, notes)


def _room(plan: _Plan) -> int:
    spec = plan.spec
    of_agent = spec.private_tokens[1] + plan.rounds * (
        spec.agents * (spec.block_tokens + 30) + spec.block_tokens + 200
    )
    return 2 * max(spec.agents * of_agent, plan.burst * 800)


# ---- what is said -------------------------------------------------------------------------------


def _write(llm: LLM, plan: _Plan, seed: int) -> list[RoundTexts]:
    """What everybody says in each round; the people are those of the first."""
    return [
        write_texts(
            llm,
            WorkloadSpec(
                plan.spec.agents,
                plan.spec.block_tokens,
                plan.spec.private_tokens,
                source=plan.spec.source,
                seed=100 * seed + number,
            ),
        )
        for number in range(plan.rounds)
    ]


def _messages(said: Sequence[RoundTexts], number: int, agent: int) -> list[Message]:
    """What an agent reads in a round: who it is, and what it has heard and said so far."""
    messages: list[Message] = [{"role": "system", "content": [private(said[0].systems[agent])]}]
    for earlier in range(number + 1):
        heard = [shared(part.content) for part in said[earlier].blocks]
        messages.append({"role": "user", "content": [private(NEWS), *heard, private(TASK)]})
        if earlier < number:
            own = said[earlier + 1].blocks[agent]
            messages.append({"role": "assistant", "content": [private(own.content)]})
    return messages


def _as_text(llm: LLM, messages: Sequence[Message]) -> list[dict[str, str]]:
    """The same as any client would send it."""
    return [
        {"role": message["role"], "content": _joined(llm, message["content"])}
        for message in messages
    ]


def _joined(llm: LLM, parts: Sequence[Part]) -> str:
    contents = [part.content for part in parts]
    return "".join(one if isinstance(one, str) else llm.encoder.decode(one) for one in contents)


# ---- how it is sent -----------------------------------------------------------------------------


class _Client:
    """Sends chat requests together, as an unknown tenant each time that it is told so."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._keys = itertools.cycle(_KEYS)
        self._key = next(self._keys)

    def become_unknown(self) -> None:
        """Go on with a key that shares nothing with what was sent before."""
        self._key = next(self._keys)

    def ask(
        self, conversations: Sequence[Sequence[dict[str, str]]], num_tokens: int
    ) -> tuple[float, list[dict[str, Any]]]:
        """Send all at once; return the seconds until the last answer, and the answers."""
        return asyncio.run(self._ask(conversations, num_tokens))

    async def _ask(
        self, conversations: Sequence[Sequence[dict[str, str]]], num_tokens: int
    ) -> tuple[float, list[dict[str, Any]]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._address,
            timeout=None,
            limits=limits,
            headers={"Authorization": f"Bearer {self._key}"},
        ) as client:
            await client.get("/health")  # what follows is not the first connection
            bodies = [
                {
                    "model": _NAME,
                    "messages": messages,
                    "max_tokens": num_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                for messages in conversations
            ]
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=body) for body in bodies)
            )
            seconds = time.perf_counter() - start
        for answer in answers:
            answer.raise_for_status()
        return seconds, [answer.json() for answer in answers]


# ---- what is measured ---------------------------------------------------------------------------


def _rounds(
    plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client, repeats: int
) -> list[Row]:
    """Whole conversations in turn; a row for each round, and one for all."""
    agents = range(plan.spec.agents)
    seconds: dict[tuple[str, int], list[float]] = {}
    tokens: dict[tuple[str, int], tuple[int, int]] = {}

    def by_library() -> float:
        library.engine.forget()
        for number in range(plan.rounds):
            prompts = [
                Prompt(_messages(said, number, agent), agent=said[0].names[agent])
                for agent in agents
            ]
            result = run_checked(library, prompts, plan.answer_tokens)
            note(_LIBRARY, number, wall_seconds(result))
            stats = result.stats
            tokens[_LIBRARY, number] = stats.computed_tokens, stats.reused_tokens
        return sum(seconds[_LIBRARY, number][-1] for number in range(plan.rounds))

    def by_http() -> float:
        client.become_unknown()
        for number in range(plan.rounds):
            texts = [_as_text(library, _messages(said, number, agent)) for agent in agents]
            taken, answers = client.ask(texts, plan.answer_tokens)
            note(_HTTP, number, taken)
            usages = [answer["usage"] for answer in answers]
            reused = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
            length = sum(usage["prompt_tokens"] for usage in usages)
            tokens[_HTTP, number] = length - reused, reused
        return sum(seconds[_HTTP, number][-1] for number in range(plan.rounds))

    def note(over: str, number: int, taken: float) -> None:
        seconds.setdefault((over, number), []).append(taken)

    whole = in_turn({_LIBRARY: by_library, _HTTP: by_http}, repeats)
    rows = []
    for number in range(plan.rounds):
        one = {over: seconds[over, number][-repeats:] for over in (_LIBRARY, _HTTP)}
        counts = {over: tokens[over, number] for over in one}
        rows += _pair(f"round {number + 1}", plan.spec.agents, one, counts)
    total = {
        over: tuple(sum(tokens[over, n][place] for n in range(plan.rounds)) for place in (0, 1))
        for over in (_LIBRARY, _HTTP)
    }
    return [*rows, *_pair("all rounds", plan.spec.agents, whole, total)]


def _lone(plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client) -> list[Row]:
    """Requests that come alone, each with a text that was not there before."""
    texts = [
        [{"role": "user", "content": f"{place}. {system} {TASK}"}]
        for place in range(-(-2 * plan.lone_turns // plan.spec.agents) + 1)
        for system in said[0].systems
    ]
    own, theirs = iter(texts), iter(texts)

    def by_library() -> float:
        messages = next(own)
        start = time.perf_counter()
        (output,) = library.generate(
            [Prompt([{"role": "user", "content": messages[0]["content"]}])],
            answer_params(plan.answer_tokens),
        )
        assert output.error is None
        return time.perf_counter() - start

    def by_http() -> float:
        client.become_unknown()
        return client.ask([next(theirs)], plan.answer_tokens)[0]

    library.engine.forget()
    found = in_turn({_LIBRARY: by_library, _HTTP: by_http}, plan.lone_turns)
    return _pair("lone", 1, found, {})


def _burst(plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client) -> list[Row]:
    """Requests at once that share a text, far more than run at a time."""
    client.become_unknown()
    heard = _joined(library, said[0].blocks[:4])
    systems = said[0].systems
    texts = [
        [
            {"role": "system", "content": f"Number {place}. {systems[place % len(systems)][:400]}"},
            {"role": "user", "content": f"{NEWS}{heard}{TASK}"},
        ]
        for place in range(plan.burst)
    ]
    seconds, answers = client.ask(texts, 8)
    reused = sum(one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers)
    length = sum(one["usage"]["prompt_tokens"] for one in answers)
    row = _row("burst", plan.burst, _HTTP, [seconds], None, (length - reused, reused))
    return [{**row, "answered": len(answers)}]


def _pair(
    what: str,
    agents: int,
    found: dict[str, list[float]],
    tokens: dict[str, Any],
) -> list[Row]:
    speed = ratio(found[_LIBRARY], found[_HTTP])
    return [
        _row(what, agents, over, seconds, speed if over == _HTTP else None, tokens.get(over))
        for over, seconds in found.items()
    ]


def _row(
    what: str,
    agents: int,
    over: str,
    seconds: Sequence[float],
    speed: float | None,
    tokens: tuple[int, int] | None,
) -> Row:
    computed, reused = tokens or (None, None)
    return {
        "what": what,
        "agents": agents,
        "over": over,
        **spread(seconds),
        "speed": speed,
        "computed": computed,
        "reused": reused,
    }


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by round, a group of bars for each way."""
    bars: dict[str, dict[str, float]] = {}
    for row in result.rows:
        if row["what"] != "burst":
            bars.setdefault(row["over"], {})[row["what"]] = round(row["median"], 3)
    draw_bars(path, bars, title=f"Over HTTP, {result.model}", y_label="seconds")
