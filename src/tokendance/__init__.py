"""TokenDance: rounds of LLM agents that share the KV cache of what they all read."""

from tokendance.conversation import Agent
from tokendance.llm import LLM
from tokendance.outputs import KVBytes, Output, RoundResult, RoundStats
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Part, Prompt, private, shared, strip_separator
from tokendance.session import Session

__all__ = [
    "LLM",
    "Agent",
    "KVBytes",
    "Output",
    "Part",
    "Prompt",
    "RoundResult",
    "RoundStats",
    "SamplingParams",
    "Session",
    "private",
    "shared",
    "strip_separator",
]

__version__ = "0.1.0"
