"""Discovery for all tenants: the texts of each are compared with its own only."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from tokendance.rounds.discovery import Discovery, DiscoveryConfig, DiscoveryResult
from tokendance.rounds.segments import Salt, TokenIds

log = logging.getLogger("tokendance.rounds")

# Tenants whose texts are remembered; the least recently used is forgotten.
_MAX_TENANTS = 64


class Discoveries:
    """A `Discovery` for each tenant, known by the salt of its prompts.

    Tenants' prompts may be compared on several threads at once; those of one tenant may not.
    """

    def __init__(self, config: DiscoveryConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._by_salt: OrderedDict[Salt, Discovery] = OrderedDict()

    def __iter__(self) -> Iterator[Discovery]:
        with self._lock:
            return iter(list(self._by_salt.values()))

    def _of(self, salt: Salt) -> Discovery:
        """That of a tenant, who is now the one that was heard of last."""
        with self._lock:
            discovery = self._by_salt.pop(salt, None) or Discovery(salt, self._config)
            self._by_salt[salt] = discovery
            if len(self._by_salt) > _MAX_TENANTS:
                self._by_salt.popitem(last=False)
            return discovery

    def segment(
        self, salt: Salt, prompts: Sequence[TokenIds], now: float, prefix_lengths: Sequence[int]
    ) -> DiscoveryResult | None:
        """Do what `Discovery.segment` does for a tenant; None if it fails.

        Requests run all the same then, and what was remembered of the tenant is forgotten.
        """
        try:
            return self._of(salt).segment(prompts, now, prefix_lengths)
        except Exception:
            log.exception("prompts could not be compared; what was remembered is forgotten")
            with self._lock:
                self._by_salt.pop(salt, None)
            return None

    def note_output(self, salt: Salt, prompt: TokenIds, output: TokenIds) -> None:
        """Do what `Discovery.note_output` does for a tenant whose prompts are remembered."""
        if (discovery := self._by_salt.get(salt)) is not None:
            discovery.note_output(prompt, output)

    def clear(self) -> None:
        """Forget all texts."""
        self._by_salt.clear()
