"""The errors that TokenDance raises.

    TokenDanceError
    ├── ConfigError               a setting that cannot be
    ├── ModelError
    │   ├── ModelNotFoundError    no such folder, hub id or alias, or its files are broken
    │   └── UnsupportedModelError the shared-attention arithmetic does not hold for it
    ├── InputError
    │   ├── PromptError           one prompt is empty, or refused by the template
    │   │   └── ContextError      it does not fit the model's context
    │   ├── RoundError            the round as a whole is wrong: empty, a name twice
    │   └── TraceError            a line of a trace cannot be read
    ├── StoreError                a folder of sessions that cannot be used
    │   ├── CorruptFileError      a file in it is not what was written
    │   └── NotStoredError        a round was answered, and is not on disk (in outputs.py)
    ├── EngineError               the engine has failed and is given up
    ├── UsageError                an LLM is called where it cannot be: after a fork, by its callback
    ├── BaselineError             the engine that we compare with is missing or failed
    └── RequestError              a request could not be finished; the others are unharmed
        ├── BudgetError           the KV budget cannot hold it
        ├── NumericsError         the model produced NaN or infinity for it
        ├── ConstraintError       what its answer shall look like cannot be followed
        ├── StepError             the forward pass that was to compute it failed
        └── AbortedError          the caller took it back, or the engine has stopped

Each message is one sentence that says what happened, and one that says what to do.
"""


class TokenDanceError(Exception):
    """Anything that a user of the package can cause and mend."""


class ConfigError(TokenDanceError, ValueError):
    """A setting that cannot be."""


class ModelError(TokenDanceError):
    """A model that cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no such folder, hub id or alias, or its files are broken."""


class UnsupportedModelError(ModelError):
    """The arithmetic of shared attention does not hold for this model."""


class InputError(TokenDanceError, ValueError):
    """What was asked cannot be run."""


class PromptError(InputError):
    """One prompt is empty, too long, or refused by the chat template."""


class ContextError(PromptError):
    """One prompt, with room for its answer, does not fit the model's context."""


class RoundError(InputError):
    """A round as a whole is wrong."""


class TraceError(InputError):
    """A line of a trace cannot be read."""


class StoreError(TokenDanceError):
    """A folder of sessions cannot be used."""


class CorruptFileError(StoreError):
    """A file of the store is not what was written."""


class EngineError(TokenDanceError):
    """The engine has failed and is given up."""


class UsageError(TokenDanceError, RuntimeError):
    """An LLM is called where it cannot be: after a fork, by its own callback, when it is served."""


class BaselineError(TokenDanceError):
    """The engine that we compare with is missing or failed."""


class RequestError(TokenDanceError):
    """A request could not be finished; the others of its batch are unharmed."""


class BudgetError(RequestError):
    """The KV budget cannot hold the request."""


class NumericsError(RequestError):
    """The model produced NaN or infinity for the request."""


class ConstraintError(RequestError):
    """What the request's answer shall look like cannot be followed."""


class StepError(RequestError):
    """The forward pass that was to compute the request failed."""


class AbortedError(RequestError):
    """The caller took the request back, or the engine has stopped."""
