"""Traces: recorded or live rounds, one JSON object a line.

Lines have a `type`:

    meta    anything; the first line, usually
    agent   agent, and system, or persona with memories
    round   round, time, shared: [{agent, text}],
            requests: [{agent, private_history, task, recorded_output}]

A trace without rounds is run live: each round's shared blocks are what the agents said in the
round before.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from tokendance.errors import TraceError

MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class TraceAgent:
    """One agent: its name and the text that makes it who it is."""

    name: str
    system: str


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What one agent was asked in a recorded round, and what it answered."""

    agent: str
    private_history: str
    task: str
    recorded_output: str


@dataclass(frozen=True, slots=True)
class TraceRound:
    """One recorded round; `shared` holds (speaker, text)."""

    number: int
    shared: tuple[tuple[str, str], ...]
    requests: tuple[TraceRequest, ...]


@dataclass(slots=True)
class Trace:
    """Agents, and the recorded rounds if there are any."""

    agents: dict[str, TraceAgent] = field(default_factory=dict)
    rounds: list[TraceRound] = field(default_factory=list)


def example_trace() -> Path:
    """Path of the example town, in an installed package or in a checkout."""
    installed = resources.files("tokendance") / "examples" / "town.jsonl"
    if installed.is_file():
        return Path(str(installed))
    return Path(__file__).parents[3] / "examples" / "town.jsonl"


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        TraceError: naming the file and the line that cannot be read, and why.
    """
    trace = Trace()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        _read_line(line, trace)
                    except (ValueError, TypeError, KeyError) as error:
                        raise TraceError(
                            f"{path}, line {number}: {_reason(error)}. "
                            "Mend or remove the line; docs/traces.md describes the format."
                        ) from error
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror}. Give the path of a trace file."
        ) from error
    if not trace.agents:
        raise TraceError(f"{path} has no line of type 'agent'. A trace needs at least one agent.")
    return trace


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return str(error)


def _read_line(line: bytes, trace: Trace) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    record = json.loads(line)
    if not isinstance(record, Mapping):
        raise TypeError("not a JSON object")
    match record["type"]:
        case "meta":
            pass
        case "agent":
            agent = _read_agent(record)
            if agent.name in trace.agents:
                raise ValueError(f"the agent {agent.name!r} was given before")
            trace.agents[agent.name] = agent
        case "round":
            trace.rounds.append(_read_round(record, trace))
        case other:
            raise ValueError(f"the type {other!r} is none of meta, agent, round")


def _read_agent(record: Mapping[str, Any]) -> TraceAgent:
    if "system" in record:
        return TraceAgent(_text(record, "agent"), _text(record, "system"))
    memories = record.get("memories", [])
    if not isinstance(memories, list) or not all(isinstance(text, str) for text in memories):
        raise TypeError("'memories' is not a list of texts")
    lines = [_text(record, "persona"), *(f"- {text}" for text in memories)]
    return TraceAgent(_text(record, "agent"), "\n".join(lines))


def _read_round(record: Mapping[str, Any], trace: Trace) -> TraceRound:
    requests = tuple(
        TraceRequest(*(_text(item, field.name) for field in fields(TraceRequest)))
        for item in _list(record, "requests")
    )
    for request in requests:
        if request.agent not in trace.agents:
            raise ValueError(f"the agent {request.agent!r} has no line of its own before")
    if not requests:
        raise ValueError("the round has no requests")
    if len({request.agent for request in requests}) < len(requests):
        raise ValueError("an agent has two requests in one round")
    shared = tuple((_text(item, "agent"), _text(item, "text")) for item in _list(record, "shared"))
    number = record["round"]
    if not isinstance(number, int):
        raise TypeError("'round' is not a number")
    return TraceRound(number, shared, requests)


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record[key]
    if not isinstance(value, list):
        raise TypeError(f"{key!r} is not a list")
    return value


def _text(record: Any, key: str) -> str:
    if not isinstance(record, Mapping):
        raise TypeError("an item is not a JSON object")
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} is not a text")
    return value
