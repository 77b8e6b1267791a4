"""When reading KV from disk pays: what it costs, against computing the same tokens again."""

from collections.abc import Callable, Iterable

from tokendance.disk.kv_file import WrittenFile
from tokendance.store.eviction import EvictionOrder

# Assumed until files have been read here.
_FIRST_BYTES_PER_S = 500e6


class ReadCost:
    """Compares the speed at which files were read last with that of the last large prefill."""

    def __init__(self, bytes_per_token: int, seconds_per_token: Callable[[], float | None]) -> None:
        """Begin with an assumed speed of the disk.

        Args:
            bytes_per_token: of KV in memory.
            seconds_per_token: what computing a token takes; None while nobody knows.
        """
        self._bytes_per_token = bytes_per_token
        self._seconds_per_token = seconds_per_token
        self._bytes_per_s = _FIRST_BYTES_PER_S

    def note_read(self, num_bytes: int, seconds: float) -> None:
        """Take the speed of what has just been read."""
        self._bytes_per_s = num_bytes / seconds

    def pays(self, files: Iterable[WrittenFile]) -> bool:
        """Whether reading files takes less time than computing what they hold. Changes nothing."""
        compute_s = self._seconds_per_token()
        if compute_s is None:
            return True
        num_bytes = num_rows = 0
        for file in files:
            num_bytes += file.num_bytes
            num_rows += file.num_rows
        return num_bytes / self._bytes_per_s < compute_s * num_rows

    def tell(self, order: EvictionOrder) -> None:
        """Tell the order of eviction what an entry on disk costs, as a share of computing it."""
        compute_s = self._seconds_per_token()
        if compute_s is not None:
            order.disk_cost = self._bytes_per_token / self._bytes_per_s / compute_s
