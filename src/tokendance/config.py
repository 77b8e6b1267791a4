"""Settings, one frozen class per room. Each default is written here and nowhere else."""

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tokendance.collector.correction import DEFAULT_CORRECTION, CorrectionPolicy
from tokendance.errors import ConfigError

ReuseMode = Literal["none", "prefix", "pic", "pic-batched", "collective"]
REUSE_MODES: tuple[ReuseMode, ...] = get_args(ReuseMode)
AttentionName = Literal["auto", "native", "torch", "triton", "reference"]
ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: int | str) -> int:
    """Read a size such as 1000000, "512MiB" or "2 GB".

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(value).lower())
    if match is None:
        raise ConfigError(f"{value!r} is not a size in bytes. Write it like 512MiB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: float) -> str:
    """Write a size in the largest binary unit that keeps it at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def check_writable(path: Path, option: str) -> None:
    """Find out that a file can be written before the work, not after it.

    Raises:
        ConfigError: naming the command line's option that gave the path.
    """
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Give {option} another path."
        ) from error


def default_kv_budget() -> int:
    """A quarter of the memory that this process may use; unwritten pages take none of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    return memory // 4


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Memory for KV.

    Attributes:
        kv_budget: bytes of KV memory, never exceeded.
        page_size: tokens per page.
        max_reuse_rounds: a shared segment that was reused in this many rounds is computed
            afresh, since reuse of reused KV in ever new contexts drifts.
    """

    kv_budget: int = field(default_factory=default_kv_budget)
    page_size: int = 16
    max_reuse_rounds: int = 16

    def __post_init__(self) -> None:
        for name in ("kv_budget", "page_size", "max_reuse_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. It must be 1 or more.")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The loop.

    Attributes:
        reuse: "none" computes every prompt whole; "prefix" reuses equal beginnings; "collective"
            also reuses shared segments wherever they stand, in place. "pic" is what others do
            there (CacheBlend, arXiv 2405.16444): each request takes its own copy of the segments
            and recomputes the 15% of their tokens that deviate most, one request at a time, or
            many in one pass ("pic-batched").
        correction: which tokens of reused segments are computed afresh, with "collective"; in the
            other modes it has no effect.
        max_batch_tokens: most tokens of one forward pass; longer work is cut into chunks.
        store: memory.
        shadow: share of mirrors that are kept to be computed exactly in idle time; see
            `fidelity.shadow`.
        attention: what computes it; "auto" takes the fastest that serves the model, device and
            dtype. "triton" is for GPUs and never chosen by itself, since it has not run on one
            yet; "reference" is slow on purpose.
    """

    reuse: ReuseMode = "collective"
    correction: CorrectionPolicy = DEFAULT_CORRECTION
    max_batch_tokens: int = 2048
    store: StoreConfig = field(default_factory=StoreConfig)
    shadow: float = 0.0
    attention: AttentionName = "auto"

    def __post_init__(self) -> None:
        if self.reuse not in REUSE_MODES:
            raise ConfigError(f"There is no reuse {self.reuse!r}. Use one of {REUSE_MODES}.")
        if self.attention not in ATTENTION_NAMES:
            raise ConfigError(
                f"There is no attention {self.attention!r}. Use one of {ATTENTION_NAMES}."
            )
        if not 0 <= self.shadow <= 1:
            raise ConfigError(f"shadow is {self.shadow}. Give a share from 0 to 1.")
        if self.shadow and not self.reuses_segments:
            raise ConfigError(
                f"With reuse {self.reuse!r} all answers are exact, and there is nothing to shadow. "
                "Leave shadow (--shadow) out."
            )
        if self.max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens is {self.max_batch_tokens}. It must be 1 or more.")

    @property
    def reuses_segments(self) -> bool:
        """Whether shared text is reused wherever it stands."""
        return self.reuse not in ("none", "prefix")

    @property
    def takes_copies(self) -> bool:
        """Whether requests take their own copies of shared segments, as CacheBlend does."""
        return self.reuse in ("pic", "pic-batched")
