"""The options of an engine: each name, default, help text and check is written here, once.

`LLM(...)` takes these names as keywords. The command line (`cli.py`) takes the same ones, with
hyphens, and shows the texts of the docstring below as its help; `tokendance serve` also reads them
from environment variables and from a TOML file.
"""

import contextlib
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tokendance.attention.names import ATTENTION_NAMES, AttentionName
from tokendance.collector.correction import (
    DEFAULT_CORRECTION,
    NO_CORRECTION,
    CorrectionPolicy,
    SpecReader,
    read_correction,
)
from tokendance.errors import ConfigError
from tokendance.kinds import check_kinds, is_number
from tokendance.units import parse_bytes

ReuseMode = Literal["none", "prefix", "pic", "pic-batched", "collective"]
REUSE_MODES: tuple[ReuseMode, ...] = get_args(ReuseMode)
Weights = Literal["native", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
PrivateMode = Literal["open", "isolated"]
PRIVATE_MODES: tuple[PrivateMode, ...] = get_args(PrivateMode)
DEFAULT_MODEL = "smollm2-135m"
MOST_OWNERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a user chooses of an engine.

    Attributes:
        reuse: what KV is reused. none: nothing. prefix: equal beginnings. collective: also shared
            blocks, wherever they stand, in place. pic: those too, as other engines do it
            (CacheBlend, arXiv 2405.16444): each request takes a copy of its own and recomputes the
            15% of it that deviate most, one request at a time; pic-batched: many in a pass.
        correction: which tokens of a reused block each agent computes afresh: balanced (as many as
            are worth it, by what was measured of the model; taken if left out), edges:3+1 (the
            first 3 and the last), first:4, opening:32+3+1 (these, and the first 32 of all that is
            reused anew), epic (the first 16), none, all, or target:0.01, a fidelity target. In
            Python also a policy of your own.
        owners: agents that compute what all of a round read together, a token each in turn, behind
            their own texts: none of those who read it is as far from it as from a single owner. 1:
            one computes it all, and its own answer is exact.
        private: isolated: what agents read of each other's KV was never computed behind text that
            they do not have themselves, which costs a little time and fidelity (docs/fidelity.md).
            open: it may have been. Prompts and requests may ask for isolation themselves.
        first_k: the same as the correction first:K.
        fidelity_target: the same as the correction target:KL: correct as little as keeps the KL
            divergence from full computation (nats per token) below this, by what `tokendance
            calibrate` has measured; compute where nothing does.
        shadow: share of mirrors that are computed again when there is nothing else to do, exactly,
            to see how near the answers are.
        kv_budget: memory for KV, like 2GiB; if left out, a quarter of the machine's memory, or half
            of what is free on another device.
        page_size: tokens per page of KV memory.
        max_reuse_rounds: a shared block that was reused in so many rounds is computed afresh, since
            reuse of reused KV in ever new contexts drifts.
        store: folder in which sessions with a name last, over restarts too; made if need be.
        store_budget: most bytes of KV in the store, like 10GiB; without bound if left out.
        store_int8: write new KV to the store in half the bytes, a byte per number; what that costs
            is in docs/benchmarks.md.
        dtype: auto (bfloat16 where the machine computes it), bfloat16, float16 or float32.
        weights: native (in the dtype), or int8: those of linear layers in a byte each, on a CPU;
            with AVX-512 VNNI steps are faster, at a price (docs/benchmarks.md).
        device: where the model runs, as torch names it: cpu, cuda, cuda:1.
        attention: what computes attention; auto takes the fastest that serves the model, the device
            and the dtype. triton is for GPUs, reference is slow on purpose.
        max_num_batched_tokens: most tokens of one forward pass; longer work is cut into chunks.
        threads: CPU threads of the whole process; all cores if left out.
    """

    reuse: ReuseMode = "collective"
    correction: str | CorrectionPolicy | None = None
    owners: int = 1
    private: PrivateMode = "open"
    first_k: int | None = None
    fidelity_target: float | None = None
    shadow: float = 0.0
    kv_budget: int | str | None = None
    page_size: int = 16
    max_reuse_rounds: int = 16
    store: str | Path | None = None
    store_budget: int | str | None = None
    store_int8: bool = False
    dtype: str = "auto"
    weights: Weights = "native"
    device: str = "cpu"
    attention: AttentionName = "auto"
    max_num_batched_tokens: int = 2048
    threads: int | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.reuse not in REUSE_MODES:
            raise ConfigError(f"There is no reuse {self.reuse!r}. Use one of {REUSE_MODES}.")
        if self.private not in PRIVATE_MODES:
            raise ConfigError(f"There is no private {self.private!r}. Use one of {PRIVATE_MODES}.")
        if self.attention not in ATTENTION_NAMES:
            raise ConfigError(
                f"There is no attention {self.attention!r}. Use one of {ATTENTION_NAMES}."
            )
        if self.weights not in WEIGHTS:
            raise ConfigError(f"There are no weights {self.weights!r}. Use one of {WEIGHTS}.")
        check_range(self, 0, "shadow", most=1)
        check_range(self, 1, "owners", most=MOST_OWNERS)
        check_range(self, 1, "page_size", "max_reuse_rounds", "max_num_batched_tokens", "threads")
        if self.kv_budget is not None and parse_bytes(self.kv_budget, "kv_budget") < 1:
            raise ConfigError(f"kv_budget is {self.kv_budget}. Give 1 byte or more.")
        if self.store_budget is not None:
            parse_bytes(self.store_budget, "store_budget")
        self._check_correction()
        if self.shadow and not self.reuses_segments:
            raise ConfigError(
                f"With reuse {self.reuse!r} all answers are exact, and there is nothing to shadow. "
                "Leave shadow (--shadow) out."
            )
        if self.store is None and (self.store_budget is not None or self.store_int8):
            raise ConfigError(
                "store_budget and store_int8 (--store-budget, --store-int8) go with store "
                "(--store). Give a folder, or leave them out."
            )

    def _check_correction(self) -> None:
        """Refuse what contradicts each other, and a correction that does not exist."""
        check_range(self, 0, "first_k")
        has_policy = self.correction is not None or self.first_k is not None
        if self.first_k is not None and self.correction not in (None, "first-k"):
            raise ConfigError(
                "first_k (--first-k) goes with the correction 'first-k', not with "
                f"{self.correction!r}. Leave one of them out."
            )
        if has_policy and self.fidelity_target is not None:
            raise ConfigError(
                "fidelity_target (--fidelity-target) chooses the correction itself. Leave it out, "
                "or correction and first_k (--correction, --first-k)."
            )
        if self.reuse != "collective" and (has_policy or self.fidelity_target is not None):
            raise ConfigError(
                "correction, first_k and fidelity_target go with reuse 'collective' "
                f"(--reuse collective), not with {self.reuse!r}. Leave them out."
            )
        if self.reuse != "collective" and self.owners > 1:
            raise ConfigError(
                f"owners is {self.owners}, and goes with reuse 'collective' (--reuse collective), "
                f"not with {self.reuse!r}. Leave it out."
            )
        if self.fidelity_target is not None and not self.fidelity_target > 0:
            raise ConfigError(
                f"The fidelity target is {self.fidelity_target}. Give a KL divergence above 0."
            )
        self.read_correction(dict.fromkeys(("balanced", "target:"), lambda _: NO_CORRECTION))

    @classmethod
    def of(cls, options: Self | None = None, **settings: Any) -> Self:
        """Make options of keywords, which go before those of `options`.

        Raises:
            ConfigError: for a name that is no option, or a value that cannot be.
        """
        names = [field.name for field in fields(cls)]
        for name in settings.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names)}."
            raise ConfigError(f"There is no option {name!r}. {hint}")
        # Not `replace`: options of a command line have texts where there are numbers and objects.
        given = {} if options is None else {name: getattr(options, name) for name in names}
        return cls(**given | settings)

    def read_correction(self, measured: Mapping[str, SpecReader]) -> CorrectionPolicy:
        """Make the policy by which tokens of reused segments are computed afresh.

        Args:
            measured: readers of the policies that go by what was measured of the model: "balanced",
                and "target:", of the number in its spec.

        Raises:
            ConfigError: if there is none of that name.
        """
        correction = self.correction
        if self.first_k is not None:
            correction = f"first:{self.first_k}"
        elif self.fidelity_target is not None:
            correction = f"target:{self.fidelity_target}"
        if correction is None:
            correction = DEFAULT_CORRECTION
        if isinstance(correction, str):
            return read_correction(correction, measured)
        return correction

    @property
    def reuses_segments(self) -> bool:
        """Whether shared text is reused wherever it stands."""
        return self.reuse not in ("none", "prefix")

    @property
    def takes_copies(self) -> bool:
        """Whether requests take their own copies of shared segments, as CacheBlend does."""
        return self.reuse in ("pic", "pic-batched")

    def kv_bytes(self, device: str) -> int:
        """Bytes of KV memory on a device, by its name; what is free there now may count."""
        if self.kv_budget is None:
            return _default_kv_budget(device)
        return parse_bytes(self.kv_budget)


def check_range(options: object, least: float, *names: str, most: float | None = None) -> None:
    """Check numbers among an object's attributes; None, which leaves a choice open, always fits.

    Args:
        options: whose.
        least: each may be.
        names: of the attributes.
        most: likewise; without bound if None.

    Raises:
        ConfigError: naming the first that is out of range, or is no number.
    """
    for name in names:
        value = getattr(options, name)
        if value is None or (
            is_number(value) and value >= least and (most is None or value <= most)
        ):
            continue
        allowed = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
        raise ConfigError(f"{name} is {value}. Give {allowed}.")


def _default_kv_budget(device: str = "cpu") -> int:
    """A quarter of the memory that this process may use; on another device half of what is free.

    Pages that are not written take none of the machine's memory.
    """
    if device != "cpu":
        import torch

        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free) // 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    return memory // 4
