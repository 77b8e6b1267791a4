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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from rich.console import Console

from tokendance.bench.arms import generate_seconds, load, make_engine, run_checked, wall_seconds
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn, ratio, spread
from tokendance.bench.workload import NEWS, TASK, RoundTexts, WorkloadSpec, write_texts
from tokendance.llm import LLM
from tokendance.rounds.prompts import Message, Part, Prompt, private
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
    """What is measured."""

    spec: WorkloadSpec  # of a conversation's people and of what they say in a round
    rounds: int  # of a conversation
    answer_tokens: int  # of every answer
    burst: int  # requests at once
    lone_turns: int  # lone requests of each kind


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
    library, over_http = (make_engine(model, settings.engine, "collective", room) for _ in range(2))
    max_open = max(256, 2 * plan.burst)
    server = ServerSettings(
        served_name=_NAME, api_keys=_KEYS, max_open_requests=max_open, reserved_kv=0.0
    )
    table = LiveTable(console, "the library, and the same over HTTP", _COLUMNS)
    with console.status("The people of the rounds write ..."):
        # What everybody says in each round; the people are those of the first.
        said = [
            write_texts(library, replace(plan.spec, seed=100 * settings.seed + number))
            for number in range(plan.rounds)
        ]
    with served(create_app(over_http, server)) as (port, _):
        client = _Client(f"http://127.0.0.1:{port}")
        table.add(*_rounds(plan, said, library, client, settings.repeats))
        table.add(*_lone(plan, said, library, client))
        table.add(_burst(plan, said, library, client))
    rows = {(row["what"], row["over"]): row for row in table.rows}
    headline: dict[str, float | None] = {
        "round_speed": rows["all rounds", _HTTP]["speed"],
        "lone_latency": 1 / rows["lone", _HTTP]["speed"],
        "burst_answered": rows["burst", _HTTP]["answered"],
    }
    note = (
        "speed: of the library's, the median of runs in turn. Answers have "
        f"{plan.answer_tokens} tokens. What the model reads over HTTP is what the library was "
        "given, as plain text in chat messages; nothing says what of it is shared."
    )
    return SuiteResult("serve", settings.model, table.rows, headline, [note])


def _room(plan: _Plan) -> int:
    """Tokens that engines have room for: a conversation, or the burst, twice over."""
    spec = plan.spec
    of_agent = spec.private_tokens[1] + plan.rounds * (
        spec.agents * (spec.block_tokens + 30) + spec.block_tokens + 200
    )
    return 2 * max(spec.agents * of_agent, plan.burst * 800)


def _messages(said: Sequence[RoundTexts], number: int, agent: int) -> list[Message]:
    """What an agent reads in a round: who it is, and what it has heard and said so far."""
    messages: list[Message] = [{"role": "system", "content": [private(said[0].systems[agent])]}]
    for earlier in range(number + 1):
        content = [private(NEWS), *said[earlier].blocks, private(TASK)]
        messages.append({"role": "user", "content": content})
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
    return "".join(
        part.content if isinstance(part.content, str) else llm.encoder.decode(part.content)
        for part in parts
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """Of requests that were sent together."""

    seconds: float  # until the last answer
    count: int  # of them
    computed: int  # prompt tokens, likewise the next
    reused: int


class _Client:
    """Sends chat requests together, as an unknown tenant each time that it is told so."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._keys = itertools.cycle(_KEYS)
        self._key = next(self._keys)

    def become_unknown(self) -> None:
        """Go on with a key that shares nothing with what was sent before."""
        self._key = next(self._keys)

    def ask(self, conversations: Sequence[Sequence[dict[str, str]]], num_tokens: int) -> _Answers:
        """Send all at once, and wait for the last answer."""
        return asyncio.run(self._ask(conversations, num_tokens))

    async def _ask(
        self, conversations: Sequence[Sequence[dict[str, str]]], num_tokens: int
    ) -> _Answers:
        common = {"model": _NAME, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(
            base_url=self._address,
            timeout=None,
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {self._key}"},
        ) as client:
            await client.get("/health")  # what follows is not the first connection
            bodies = [common | {"messages": messages} for messages in conversations]
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=body) for body in bodies)
            )
            seconds = time.perf_counter() - start
        usages = [answer.raise_for_status().json()["usage"] for answer in answers]
        reused = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        num_prompt = sum(usage["prompt_tokens"] for usage in usages)
        return _Answers(seconds, len(usages), num_prompt - reused, reused)


def _rounds(
    plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client, repeats: int
) -> list[Row]:
    """Whole conversations in turn; a row for each round, and one for all."""
    agents = range(plan.spec.agents)
    seconds: dict[tuple[str, int], list[float]] = {}
    tokens: dict[tuple[str, int], tuple[int, int]] = {}  # of the last turn

    def note(over: str, number: int, round_s: float, computed: int, reused: int) -> float:
        seconds.setdefault((over, number), []).append(round_s)
        tokens[over, number] = computed, reused
        return round_s

    def by_library() -> float:
        library.engine.forget()
        total_s = 0.0
        for number in range(plan.rounds):
            prompts = [
                Prompt(_messages(said, number, agent), agent=said[0].names[agent])
                for agent in agents
            ]
            result = run_checked(library, prompts, plan.answer_tokens)
            counts = result.stats.computed_tokens, result.stats.reused_tokens
            total_s += note(_LIBRARY, number, wall_seconds(result), *counts)
        return total_s

    def by_http() -> float:
        client.become_unknown()
        total_s = 0.0
        for number in range(plan.rounds):
            texts = [_as_text(library, _messages(said, number, agent)) for agent in agents]
            answers = client.ask(texts, plan.answer_tokens)
            total_s += note(_HTTP, number, answers.seconds, answers.computed, answers.reused)
        return total_s

    whole = in_turn({_LIBRARY: by_library, _HTTP: by_http}, repeats)
    rows: list[Row] = []
    for number in range(plan.rounds):
        of_round = {over: seconds[over, number][-repeats:] for over in whole}
        counts = {over: tokens[over, number] for over in whole}
        rows += _rows(f"round {number + 1}", plan.spec.agents, of_round, counts)
    total = {
        over: (
            sum(tokens[over, number][0] for number in range(plan.rounds)),
            sum(tokens[over, number][1] for number in range(plan.rounds)),
        )
        for over in whole
    }
    return [*rows, *_rows("all rounds", plan.spec.agents, whole, total)]


def _lone(plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client) -> list[Row]:
    """Requests that come alone, each with a text that was not there before."""
    texts = [
        f"{number}. {system} {TASK}"
        for number in range(-(-2 * plan.lone_turns // plan.spec.agents) + 1)
        for system in said[0].systems
    ]
    own, theirs = iter(texts), iter(texts)

    def by_library() -> float:
        prompt = Prompt([{"role": "user", "content": next(own)}])
        return generate_seconds(library, [prompt], plan.answer_tokens)

    def by_http() -> float:
        client.become_unknown()
        messages = [{"role": "user", "content": next(theirs)}]
        return client.ask([messages], plan.answer_tokens).seconds

    library.engine.forget()
    seconds = in_turn({_LIBRARY: by_library, _HTTP: by_http}, plan.lone_turns)
    return _rows("lone", 1, seconds, {})


def _burst(plan: _Plan, said: list[RoundTexts], library: LLM, client: _Client) -> Row:
    """Requests at once that share a text, far more than run at a time."""
    client.become_unknown()
    blocks = _joined(library, said[0].blocks[:4])
    systems = itertools.islice(itertools.cycle(said[0].systems), plan.burst)
    texts = [
        [
            {"role": "system", "content": f"Number {number}. {system[:400]}"},
            {"role": "user", "content": f"{NEWS}{blocks}{TASK}"},
        ]
        for number, system in enumerate(systems)
    ]
    answers = client.ask(texts, 8)
    tokens = answers.computed, answers.reused
    (row,) = _rows("burst", plan.burst, {_HTTP: [answers.seconds]}, {_HTTP: tokens})
    return row | {"answered": answers.count}


def _rows(
    what: str,
    agents: int,
    seconds: Mapping[str, Sequence[float]],
    tokens: Mapping[str, tuple[int, int]],
) -> list[Row]:
    """A row for each way: its seconds, and the tokens computed and reused, if they were counted."""
    rows: list[Row] = []
    for over, of_way in seconds.items():
        computed, reused = tokens.get(over, (None, None))
        compares = over == _HTTP and _LIBRARY in seconds
        rows.append(
            {
                "what": what,
                "agents": agents,
                "over": over,
                **spread(of_way),
                "speed": ratio(seconds[_LIBRARY], of_way) if compares else None,
                "computed": computed,
                "reused": reused,
            }
        )
    return rows


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by round, a group of bars for each way."""
    rows = [row for row in result.rows if row["what"] != "burst"]
    title = f"Over HTTP, {result.model}"
    draw_bars(path, rows, "over", "what", "median", title=title, y_label="seconds")
