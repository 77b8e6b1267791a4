"""TokenDance: rounds of LLM agents that share the KV cache of what they all read."""

from tokendance.conversation import Agent
from tokendance.errors import (
    AbortedError,
    BaselineError,
    BudgetError,
    ConfigError,
    ConstraintError,
    CorruptFileError,
    EngineError,
    InputError,
    ModelError,
    ModelNotFoundError,
    NumericsError,
    PromptError,
    RequestError,
    RoundError,
    StepError,
    StoreError,
    TokenDanceError,
    TraceError,
    UnsupportedModelError,
)
from tokendance.llm import LLM
from tokendance.outputs import KVBytes, NotStoredError, Output, RoundResult, RoundStats
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Part, Prompt, private, shared, strip_separator
from tokendance.session import Session

__all__ = [
    "LLM",
    "AbortedError",
    "Agent",
    "BaselineError",
    "BudgetError",
    "ConfigError",
    "ConstraintError",
    "CorruptFileError",
    "EngineError",
    "InputError",
    "KVBytes",
    "ModelError",
    "ModelNotFoundError",
    "NotStoredError",
    "NumericsError",
    "Output",
    "Part",
    "Prompt",
    "PromptError",
    "RequestError",
    "RoundError",
    "RoundResult",
    "RoundStats",
    "SamplingParams",
    "Session",
    "StepError",
    "StoreError",
    "TokenDanceError",
    "TraceError",
    "UnsupportedModelError",
    "private",
    "shared",
    "strip_separator",
]

__version__ = "0.1.0"
