"""Metrics of rounds, beside vLLM's own at /metrics.

The scheduler is in another process than the API server. Its figures travel with vLLM's statistics
of each step: `RoundStats` is these statistics with one field more. vLLM's decoder is told to read
it; a front end that is not told leaves the field out.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import prometheus_client
import vllm.v1.engine as engine
from vllm.platforms import current_platform
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import SchedulerStats

from tokendance.integrations.vllm.figures import Figures
from tokendance.integrations.vllm.support import why_not

_COUNTERS = {
    "rounds": "Rounds whose requests share something.",
    "mirrors": "Requests that read KV of others where it lies.",
    "prompt_tokens": "Prompt tokens of requests that could be in a round.",
    "computed_tokens": "Of these, computed.",
    "reused_tokens": "Of these, read where others have computed them.",
    "corrected_tokens": "Of the computed, shared and computed afresh.",
}


@dataclass
class RoundStats(SchedulerStats):  # type: ignore[misc]
    """vLLM's statistics of a step, with figures of rounds."""

    tokendance: Figures | None = None


def install() -> None:
    """Have this process read figures of rounds, and show them."""
    annotations = engine.EngineCoreOutputs.__annotations__
    annotations["scheduler_stats"] = RoundStats | None
    manager = loggers.StatLoggerManager
    begin = manager.__init__

    def begin_with_rounds(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, vllm_config, *args, **kwargs)
        self.stat_loggers.append(RoundLogger(vllm_config, self.engine_indexes))

    manager.__init__ = begin_with_rounds


class RoundLogger(loggers.AggregateStatLoggerBase):  # type: ignore[misc]
    """Shows figures of rounds to Prometheus, for each engine."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        """Register the metrics; those of an earlier engine of this process give way."""
        registry = prometheus_client.REGISTRY
        for collector in list(registry._collector_to_names):
            if getattr(collector, "_name", "").startswith("tokendance:"):
                registry.unregister(collector)
        labels = ["engine"]
        gauge = partial(prometheus_client.Gauge, multiprocess_mode="mostrecent")
        self._counters = {
            name: prometheus_client.Counter(f"tokendance:{name}", text, labels)
            for name, text in _COUNTERS.items()
        }
        self._shared = gauge(
            "tokendance:shared_pages", "Blocks that several requests read.", labels
        )
        self._kv_bytes = gauge(
            "tokendance:kv_bytes",
            "KV of requests that could be in a round: resident, dense (if each had all of its own) "
            "and retained for later rounds.",
            [*labels, "kind"],
        )
        is_plain = gauge(
            "tokendance:plain_vllm", "1 if vLLM runs without TokenDance, and why.", ["reason"]
        )
        reason = why_not(vllm_config, current_platform)
        is_plain.labels(reason or "").set(int(reason is not None))
        for index in map(str, engine_indexes):  # so that they are shown from the beginning
            for counter in self._counters.values():
                counter.labels(index)
            self._shared.labels(index).set(0)
            for kind in ("dense", "resident", "retained"):
                self._kv_bytes.labels(index, kind).set(0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """See vLLM's."""
        del iteration_stats, mm_cache_stats
        figures = getattr(scheduler_stats, "tokendance", None)
        if figures is None:
            return
        index = str(engine_idx)
        for name, counter in self._counters.items():
            counter.labels(index).inc(getattr(figures, name))
        self._shared.labels(index).set(figures.shared_pages)
        for kind in ("dense", "resident", "retained"):
            num_bytes = getattr(figures, f"{kind}_pages") * figures.page_bytes
            self._kv_bytes.labels(index, kind).set(num_bytes)

    def log_engine_initialized(self) -> None:
        """See vLLM's; there is nothing to say."""
