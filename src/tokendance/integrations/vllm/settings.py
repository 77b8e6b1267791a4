"""Settings of TokenDance inside vLLM: environment variables, since vLLM's flags are its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from tokendance.collector.correction import (
    DEFAULT_CORRECTION,
    NO_CORRECTION,
    CorrectionPolicy,
    SpecReader,
    read_correction,
)
from tokendance.errors import ConfigError
from tokendance.fidelity.balanced import Balanced
from tokendance.fidelity.shipped import best_table

_PREFIX = "TOKENDANCE_"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may choose; each is read from TOKENDANCE_NAME.

    Attributes:
        correction: which tokens of a reused segment each mirror computes afresh: balanced,
            edges:3+1, first:4, opening:32+3+1, epic, none or all.
        window_ms: requests that arrive within so many milliseconds of each other make a round; more
            for clients that were seen to take longer, within the next. 0 waits for nobody.
        window_share: share of a lone request's time that it may wait for others at most.
        round_wait_s: a round with a name starts so many seconds after its last request, if it is
            not full.
        recent_s: text of prompts of so many seconds ago is reused, too.
        retained_share: share of vLLM's blocks that is kept for later rounds at most; given up
            wherever vLLM needs one.
        max_reuse_rounds: a segment that was reused in so many rounds is computed afresh.
    """

    correction: str = DEFAULT_CORRECTION
    window_ms: float = 4.0
    window_share: float = 0.1
    round_wait_s: float = 0.2
    recent_s: float = 600.0
    retained_share: float = 0.5
    max_reuse_rounds: int = 16

    def __post_init__(self) -> None:
        self._policy(lambda _: NO_CORRECTION)
        for name in ("window_ms", "window_share", "round_wait_s", "recent_s", "max_reuse_rounds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_PREFIX}{name.upper()} has to be 0 or more.")
        if not 0 <= self.retained_share <= 1:
            raise ConfigError(f"{_PREFIX}RETAINED_SHARE has to be between 0 and 1.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read them.

        Raises:
            ConfigError: for a value that cannot be.
        """
        given: dict[str, Any] = {}
        defaults = cls()
        for field in fields(cls):
            name, default = _PREFIX + field.name.upper(), getattr(defaults, field.name)
            if name not in environment:
                continue
            try:
                given[field.name] = type(default)(environment[name])
            except ValueError:
                raise ConfigError(
                    f"{name} is {environment[name]!r}. Give a number, like {default}."
                ) from None
        return cls(**given)

    def policy(self, model: str, precision: str) -> CorrectionPolicy:
        """The correction; for the arguments see `known_table`."""
        return self._policy(lambda _: Balanced(best_table(model, precision)))

    def _policy(self, balanced: SpecReader) -> CorrectionPolicy:
        return read_correction(self.correction, {"balanced": balanced})
