"""TokenDance: rounds of LLM agents that share the KV cache of what they all read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokendance.conversation import Agent
    from tokendance.errors import (
        AbortedError,
        BaselineError,
        BudgetError,
        ConfigError,
        ConstraintError,
        ContextError,
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
        UsageError,
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
    "ContextError",
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
    "UsageError",
    "private",
    "shared",
    "strip_separator",
]

__version__ = "0.1.0"

# In which order to look for a name. Importing torch and transformers takes seconds, so the command
# line imports this package without them, and shows its help at once.
_MODULES = ("errors", "rounds.prompts", "params", "outputs", "conversation", "session", "llm")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in __all__:
        for module in _MODULES:
            value = getattr(import_module(f"{__name__}.{module}"), name, None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
