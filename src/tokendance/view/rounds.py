"""Rounds as they are recorded: who read what, whence it came, and when."""

from collections import deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokendance.collector.plan import RequestPlan, Role
from tokendance.engine.events import Admitted, Compared, Finished, FirstToken, StepDone
from tokendance.engine.request import RequestId
from tokendance.outputs import Output
from tokendance.rounds.segments import EncodedPrompt, Salt, SegmentHash, TokenIds
from tokendance.store.entries import RoundId, RunId

MAX_STEPS = 2048  # of a round that are kept one by one; then neighbours are joined
_SHORTEST_ANSWER = 4  # tokens; shorter ones stand in texts by accident
_REMEMBERED_ANSWERS = 512
NO_RUN = RunId(-1)
_NO_TOKENS = np.empty(0, np.int32)


class StoredBytes(NamedTuple):
    """KV that can be found again: bytes in memory, and on disk where there is a store."""

    memory: int
    disk: int | None


# Pieces of a prompt, int32 (pieces, 6): positions of one segment that are had in one way.
# start   first position
# stop    position after the last
# role    how their KV is had: a `Role`
# part    number of the prompt's segment that they belong to
# run     that they are read from or computed for; -1 for none
# offset  of these positions against those of the run's owner, where they are reused
Pieces = npt.NDArray[np.int32]


class Part(NamedTuple):
    """A segment in a prompt: where, and what the prompt says of it."""

    start: int
    segment: int  # of `Segments`
    kind: str  # "shared", "private", or "task": the private text behind all that is shared


@dataclass(slots=True)
class KnownSegment:
    """A segment that prompts have read.

    Attributes:
        token_ids: int32.
        num_uses: prompts that are kept and hold it.
        shared: whether any of them says so.
        speaker: whose answer it holds, if it is found to.
        text: of its tokens, once somebody has decoded them.
    """

    token_ids: TokenIds
    num_uses: int = 0
    shared: bool = False
    speaker: str | None = None
    text: str | None = None


@dataclass(slots=True)
class RecordedAgent:
    """A request of a round. Times are clock times in seconds.

    Attributes:
        request: which.
        agent: whose.
        salt: of its tenant.
        parts: of its prompt.
        pieces: of its prompt, in order.
        num_prompt: tokens.
        num_exact: length of its beginning that holds no KV of another context.
        admitted_s: when it had memory, the last time.
        first_step_s: when the first pass began that computed something of it.
        first_token_s: when its prompt was computed.
        finished_s: when it was done.
        num_computed: prompt tokens computed so far.
        num_generated: tokens of its answer so far.
        silent: see `engine.request.Request`.
        output: what its caller got, when it is done; without the prompt's token ids.
        comparison: with exact computation, if there was one.
    """

    request: RequestId
    agent: str
    salt: Salt | None = None
    parts: tuple[Part, ...] = ()
    pieces: Pieces = field(default_factory=lambda: np.empty((0, 6), np.int32))
    num_prompt: int = 0
    num_exact: int = 0
    admitted_s: float | None = None
    first_step_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_computed: int = 0
    num_generated: int = 0
    silent: bool = False
    output: Output | None = None
    comparison: Compared | None = None


class Step(NamedTuple):
    """A round's part of one forward pass, or of several that follow each other."""

    start_s: float
    stop_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(slots=True)
class RecordedRound:
    """A round.

    Attributes:
        round_id: which.
        number: from 1, in the order in which its tenant's rounds began; 0 before any request of it
            had memory.
        salt: of its tenant, once it has a number.
        added_s: clock time at which its first request was added.
        num_requests: that had been added when it began.
        agents: by request.
        steps: in their order.
        resident: most bytes of KV memory that its requests held at one time.
        stored: when the last request ended.
        prefix_tokens: prompt tokens that prefix caching would have computed, once it is done.
        version: counts what has happened in it.
    """

    round_id: RoundId
    number: int = 0
    salt: Salt | None = None
    added_s: float = 0.0
    num_requests: int = 0
    agents: dict[RequestId, RecordedAgent] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    resident: int = 0
    stored: StoredBytes | None = None
    prefix_tokens: int = 0
    version: int = 0
    _to_count: dict[RequestId, tuple[TokenIds, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def is_shown(self) -> bool:
        """Whether any request of it was in a round of its own kind: shadows are not."""
        return self.number > 0

    @property
    def num_pieces(self) -> int:
        """Of all prompts."""
        return sum(len(agent.pieces) for agent in self.agents.values())

    @property
    def is_done(self) -> bool:
        """Whether all requests that are known of have ended."""
        asked = [agent for agent in self.agents.values() if not agent.silent]
        num_ended = sum(agent.finished_s is not None for agent in asked)
        return num_ended == max(self.num_requests, len(asked))

    def _agent(self, request: RequestId, name: str) -> RecordedAgent:
        return self.agents.setdefault(request, RecordedAgent(request, name))

    def admit(self, event: Admitted, segments: "Segments", runs: "Runs") -> None:
        """A request begins, perhaps anew."""
        self.version += 1
        segments.release(self._agent(event.request, event.agent))
        agent = RecordedAgent(event.request, event.agent)
        agent.salt, agent.admitted_s = event.prompt.salt, event.time_s
        agent.num_prompt, agent.num_exact = event.plan.num_prompt, event.plan.num_exact
        agent.parts = segments.hold(event.prompt)
        runs.note_owner(event, self.number)
        agent.pieces = _pieces(event.prompt, event.plan, agent.parts, event.runs, runs)
        self.agents[event.request] = agent

    def take_step(
        self, event: StepDone, num_tokens: Mapping[RequestId, int], resident: int
    ) -> None:
        """Take this round's part of a pass."""
        self.version += 1
        prompt_tokens = answer_tokens = 0
        for request, count in num_tokens.items():
            agent = self.agents[request]
            if agent.first_step_s is None:
                agent.first_step_s = event.time_s - event.seconds
            if agent.first_token_s is None:
                agent.num_computed += count
                prompt_tokens += count
            else:
                agent.num_generated += count
                answer_tokens += count
        self.resident = max(self.resident, resident)
        start_s = event.time_s - event.seconds
        self.steps.append(Step(start_s, event.time_s, prompt_tokens, answer_tokens))
        if len(self.steps) > MAX_STEPS:
            pairs = zip(self.steps[::2], self.steps[1::2], strict=False)
            joined = [
                Step(a.start_s, b.stop_s, a.prompt_tokens + b.prompt_tokens,
                     a.answer_tokens + b.answer_tokens)
                for a, b in pairs
            ]  # fmt: skip
            self.steps = joined + self.steps[len(joined) * 2 :]

    def take_first_token(self, event: FirstToken) -> None:
        """A prompt is computed."""
        self.version += 1
        if event.request in self.agents:
            agent = self.agents[event.request]
            agent.first_token_s, agent.num_generated = event.time_s, 1

    def finish(self, event: Finished) -> None:
        """A request is done, or has failed."""
        self.version += 1
        agent, output = self._agent(event.request, event.output.agent), event.output
        if output.error is None and not event.silent:
            self._to_count[event.request] = output.prompt_token_ids, output.token_ids
        agent.output = replace(output, prompt_token_ids=_NO_TOKENS, logprobs=())
        agent.silent, agent.finished_s = event.silent, event.time_s
        agent.num_generated = len(output.token_ids)

    def take_comparison(self, event: Compared) -> None:
        """A mirror was computed again."""
        self.version += 1
        if event.request in self.agents:
            self.agents[event.request].comparison = event

    def take_prompts(self) -> dict[Salt, list[tuple[TokenIds, tuple[int, ...]]]]:
        """Hand over, by tenant, prompts with their answers that prefix caching is counted for."""
        prompts: dict[Salt, list[tuple[TokenIds, tuple[int, ...]]]] = {}
        for request in sorted(self._to_count):
            salt = self.agents[request].salt
            if salt is not None:
                prompts.setdefault(salt, []).append(self._to_count[request])
        self._to_count.clear()
        return prompts


def _pieces(
    prompt: EncodedPrompt,
    plan: RequestPlan,
    parts: tuple[Part, ...],
    owned: tuple[RunId, ...],
    runs: "Runs",
) -> Pieces:
    """Cut a plan's spans where segments begin, and say which run each is of."""
    run_at = {
        start: run_id
        for run_id, run in zip(owned, plan.runs, strict=True)
        for start, _, _ in run.segments
    }
    pieces: list[tuple[int, ...]] = []
    part = 0
    for span in plan.spans:
        if span.role is Role.ANSWER:
            break
        start = span.start
        while start < span.stop:
            while part + 1 < len(parts) and parts[part + 1].start <= start:
                part += 1
            stop = min(span.stop, parts[part + 1].start if part + 1 < len(parts) else span.stop)
            run = NO_RUN
            if span.source is not None:
                run = span.source.run
            elif prompt.segments[part].shared:
                segment = prompt.segments[part]
                run = run_at.get(parts[part].start, runs.of(segment.hash))
            pieces.append((start, stop, int(span.role), part, run, span.offset))
            start = stop
    return np.array(pieces, np.int32).reshape(-1, 6)


class Segments:
    """Segments of the prompts that are kept, each once.

    Attributes:
        num_tokens: of all of them.
    """

    def __init__(self) -> None:
        """Know none."""
        self.num_tokens = 0
        self._numbers: dict[SegmentHash, int] = {}
        self._known: dict[int, KnownSegment] = {}
        self._hashes: dict[int, SegmentHash] = {}
        self._next = 0
        # Whose, by whom, and the token ids: what was said last.
        self._answers: deque[tuple[Salt | None, str, bytes]] = deque(maxlen=_REMEMBERED_ANSWERS)

    def __getitem__(self, number: int) -> KnownSegment:
        """Look a segment up."""
        return self._known[number]

    def __len__(self) -> int:
        return len(self._known)

    def hold(self, prompt: EncodedPrompt) -> tuple[Part, ...]:
        """Keep a prompt's segments."""
        shared = [index for index, segment in enumerate(prompt.segments) if segment.shared]
        parts = []
        for index, (start, segment) in enumerate(zip(prompt.starts, prompt.segments, strict=True)):
            number = self._numbers.get(segment.hash)
            if number is None:
                number, self._next = self._next, self._next + 1
                self._numbers[segment.hash], self._hashes[number] = number, segment.hash
                self._known[number] = KnownSegment(segment.token_ids)
                self.num_tokens += len(segment)
            known = self._known[number]
            known.num_uses += 1
            if segment.shared and not known.shared:
                known.shared = True
                known.speaker = self._speaker(segment.token_ids, prompt.salt)
            is_task = bool(shared) and index > shared[-1]
            kind = "shared" if segment.shared else "task" if is_task else "private"
            parts.append(Part(start, number, kind))
        return tuple(parts)

    def release(self, agent: RecordedAgent) -> None:
        """Let go of the segments of a prompt that is kept no more."""
        for part in agent.parts:
            known = self._known[part.segment]
            known.num_uses -= 1
            if known.num_uses == 0:
                self.num_tokens -= len(known.token_ids)
                del self._known[part.segment]
                del self._numbers[self._hashes.pop(part.segment)]

    def remember_answers(self, ended: RecordedRound) -> None:
        """Remember what was said in a round, to be found in what is read in the next."""
        for agent in ended.agents.values():
            if agent.output is not None and len(agent.output.token_ids) >= _SHORTEST_ANSWER:
                ids = np.array(agent.output.token_ids, np.int32)
                self._answers.append((agent.salt, agent.agent, ids.tobytes()))

    def _speaker(self, token_ids: TokenIds, salt: Salt) -> str | None:
        text = token_ids.tobytes()
        for whose, name, answer in reversed(self._answers):
            if whose == salt and answer in text:
                return name
        return None


class KnownRun(NamedTuple):
    """A run, and who has computed it."""

    run: RunId
    round_number: int
    round_id: RoundId
    agent: str
    request: RequestId
    start: int
    num_tokens: int


class Runs:
    """Runs that recorded requests own."""

    def __init__(self) -> None:
        """Know none."""
        self._known: dict[RunId, KnownRun] = {}
        self._of: dict[SegmentHash, RunId] = {}

    def __iter__(self) -> Iterator[KnownRun]:
        """All of them, in the order in which they were computed."""
        return iter(self._known.values())

    def note_owner(self, event: Admitted, round_number: int) -> None:
        """Remember the runs that a request owns."""
        for run_id, run in zip(event.runs, event.plan.runs, strict=True):
            start = run.segments[0][0]
            num_tokens = sum(length for _, _, length in run.segments)
            self._known[run_id] = KnownRun(
                run_id, round_number, event.round_id, event.agent, event.request, start, num_tokens
            )
            for _, segment, _ in run.segments:
                self._of[segment] = run_id

    def of(self, segment: SegmentHash) -> RunId:
        """The last run that a segment was computed in; `NO_RUN` if it is not known."""
        return self._of.get(segment, NO_RUN)

    def keep(self, rounds: Container[RoundId]) -> None:
        """Forget runs of rounds that are kept no more."""
        gone = {run_id for run_id, run in self._known.items() if run.round_id not in rounds}
        if gone:
            for run_id in gone:
                del self._known[run_id]
            self._of = {segment: run for segment, run in self._of.items() if run not in gone}
