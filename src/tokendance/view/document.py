"""The document of a run: what a recording is as JSON, on disk and for the page.

    format, version          "tokendance-run", 1
    engine                   what has computed it: see `EngineFacts`
    has_text                 whether it holds the text of prompts and answers
    dropped_rounds           that the recording had no room for
    first_round              number of the first that it has kept; null if there is none
    lost_events              that nobody has read in time; figures may be too small then
    segments   {number: {tokens, speaker, text}}
    runs       [{run, round, agent, start, tokens}]        `round` and `agent` own it
    rounds     [{number, start_s, stop_s, agents, steps, memory, tokens}]

Seconds count from the first round's start. `web/src/document.ts` has the same types for the page. A
version has all that the one before it has, or is refused by older readers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokendance.engine.request import RequestId
from tokendance.errors import ConfigError
from tokendance.results import write_result
from tokendance.rounds.segments import Salt
from tokendance.view.recorder import Recorded
from tokendance.view.rounds import RecordedAgent, RecordedRound, Runs

FORMAT = "tokendance-run"
VERSION = 1
MAX_FILE_BYTES = 2**30
RECORD_ADVICE = "Give --record another path."
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What has computed a run.

    Attributes:
        tokendance: its version.
        model: as it was loaded.
        dtype: of weights and KV.
        reuse: see `EngineOptions`.
        correction: its spec; None where nothing is corrected.
        page_bytes: of a page of KV memory.
        token_bytes: of a token's KV.
    """

    tokendance: str
    model: str
    dtype: str
    reuse: str
    correction: str | None
    page_bytes: int
    token_bytes: int


def make_document(
    recorded: Recorded,
    engine: EngineFacts,
    decode: Callable[[Sequence[int]], str] | None,
    rounds: Sequence[RecordedRound],
    origin_s: float,
    tenant: Salt | None = None,
) -> Json:
    """Make the document of what was recorded.

    Args:
        recorded: by a `Recorder`.
        engine: that it has watched.
        decode: token ids to text; None leaves all text out.
        rounds: of those recorded, which it holds.
        origin_s: clock time from which it counts.
        tenant: who sees it: of KV memory that is stored, nothing is said then, since it is others',
            too. None for the operator, who sees all.
    """
    agents = [agent for one in rounds for agent in one.agents.values()]
    segments: dict[str, Json] = {}
    for number in sorted({part.segment for agent in agents for part in agent.parts}):
        segment = recorded.segments[number]
        if decode is not None and segment.text is None:
            segment.text = decode(segment.token_ids.tolist())
        segments[str(number)] = {
            "tokens": len(segment.token_ids),
            "speaker": segment.speaker,
            "text": None if decode is None else segment.text,
        }
    dropped = recorded.num_dropped
    return {
        "format": FORMAT,
        "version": VERSION,
        "engine": asdict(engine),
        "has_text": decode is not None,
        "dropped_rounds": sum(dropped.values()) if tenant is None else dropped.get(tenant, 0),
        "lost_events": recorded.num_lost,
        "segments": segments,
        "runs": _runs(recorded.runs, {agent.request for agent in agents}),
        "rounds": [
            _round(one, engine, origin_s, has_text=decode is not None, is_operator=tenant is None)
            for one in rounds
        ],
    }


def _runs(runs: Runs, requests: set[RequestId]) -> list[Json]:
    return [
        {
            "run": run.run,
            "round": run.round_number,
            "agent": run.agent,
            "start": run.start,
            "tokens": run.num_tokens,
        }
        for run in runs
        if run.request in requests
    ]


def _round(
    one: RecordedRound, engine: EngineFacts, origin_s: float, *, has_text: bool, is_operator: bool
) -> Json:
    agents = sorted(one.agents.values(), key=lambda agent: agent.request)
    well = [agent for agent in agents if agent.output is None or agent.output.error is None]
    asked = [agent for agent in well if not agent.silent]
    prompt = sum(agent.num_prompt for agent in asked)
    generated = sum(agent.num_generated for agent in asked)
    stop_s = max((a.finished_s for a in agents if a.finished_s is not None), default=None)
    return {
        "number": one.number,
        "start_s": _since(origin_s, one.added_s),
        "stop_s": _since(origin_s, stop_s) if one.is_done else None,
        "agents": [_agent(agent, origin_s, has_text=has_text) for agent in agents],
        "steps": [
            [
                _since(origin_s, step.start_s),
                _since(origin_s, step.stop_s),
                step.prompt_tokens,
                step.answer_tokens,
            ]
            for step in one.steps
        ],
        "memory": {
            "dense": (prompt + generated) * engine.token_bytes,
            "resident": one.resident,
            "stored": one.stored._asdict() if one.stored is not None and is_operator else None,
        },
        "tokens": {
            "prompt": prompt,
            "generated": generated,
            "computed": _total(well, "computed_tokens"),
            "reused": _total(asked, "reused_tokens"),
            "corrected": _total(asked, "corrected_tokens"),
            "approximate": _total(asked, "approximate_tokens"),
            "none": _total(asked, "prompt_tokens"),
            "prefix": one.prefix_tokens if one.is_done else None,
        },
    }


def _agent(agent: RecordedAgent, origin_s: float, *, has_text: bool) -> Json:
    output, compared = agent.output, agent.comparison
    failed = output is not None and output.error is not None
    return {
        "agent": agent.agent,
        "neutral": agent.silent,
        "prompt": agent.num_prompt,
        "exact": agent.num_exact,
        "computed": agent.num_computed,
        "generated": agent.num_generated,
        "parts": [list(part) for part in agent.parts],
        "pieces": agent.pieces.tolist(),
        "times": {
            "admitted": _since(origin_s, agent.admitted_s),
            "first_step": _since(origin_s, agent.first_step_s),
            "first_token": _since(origin_s, agent.first_token_s),
            "finished": _since(origin_s, agent.finished_s),
        },
        "answer": output.text if output is not None and has_text else None,
        "finish_reason": None if output is None else output.finish_reason,
        # What an error says may hold what was asked.
        "error": str(output.error) if output is not None and failed and has_text else None,
        "shadow": None
        if compared is None
        else {
            "tokens": compared.num_tokens,
            "kl_next": compared.kl_next,
            "kl": compared.kl,
            "top1": compared.top1,
        },
    }


def _total(agents: Sequence[RecordedAgent], figure: str) -> int:
    return sum(getattr(agent.output, figure) for agent in agents if agent.output is not None)


def _since(origin_s: float, time_s: float | None) -> float | None:
    return None if time_s is None else round(time_s - origin_s, 6)


# -- on disk --------------------------------------------------------------------------------------


def write_document(path: Path, document: Json) -> None:
    """Write a run whole, or leave what was there.

    Raises:
        ConfigError: if it cannot be written.
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    write_result(path, text + "\n", RECORD_ADVICE)


def read_document(path: Path) -> Json:
    """Read a run.

    Raises:
        ConfigError: if it cannot be read, is no run, or is of a later version.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than 1 GiB, which no run is. Give another file.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give another file.") from error
    except (UnicodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. {_HOW_TO_RECORD}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} is no recorded run. {_HOW_TO_RECORD}")
    version = document.get("version")
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version!r} of its format, and this is TokenDance for version "
            f"{VERSION}. Show it with the version of TokenDance that wrote it, or a later one."
        )
    missing = {"engine", "segments", "runs", "rounds"} - document.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}. {_HOW_TO_RECORD}")
    return document


_HOW_TO_RECORD = "`tokendance run --record FILE` writes one."
