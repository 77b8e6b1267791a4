"""The disk tier: sessions in a folder that outlives the process, however it ends.

    folder/           (disk/folder.py)
      lock            held by the one process that has the store open
      index.sqlite    sessions, their caches, and files with their checksums (disk/index.py)
      kv/             files of KV rows (disk/kv_file.py), named at random

A round becomes durable in two steps. Files are written under temporary names, flushed, renamed, and
their folder is flushed; then one transaction names them in the index. A file that is on disk and
not in the index is left over from a write that did not end, and is removed when the store is
opened. So what the index says is there, and nothing else is.

What a session says (its state) is small and is always kept. KV can be computed again: where the
budget is short it goes first, session by session, those that were used longest ago first.
"""

import contextlib
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tokendance.disk.folder import INDEX, KV, LOCK, check_folder, take_lock
from tokendance.disk.index import SessionIndex
from tokendance.disk.kv_file import WrittenFile, flush_folder, is_kv_name, read_rows, write_rows
from tokendance.disk.records import (
    CacheRecord,
    FileId,
    Problem,
    SegmentRecord,
    SessionKey,
    StoredSession,
)
from tokendance.disk.schema import storage_errors
from tokendance.errors import CorruptFileError, StoreError
from tokendance.store.kv_rows import KVRows

NO_BUDGET = 2**63 - 1


class DiskStore:
    """Sessions on disk; see the module. One process at a time may open it.

    Attributes:
        folder: where it lies.
        budget: most bytes of KV files.
        index: of what is there, to look at; only this class changes it.
        num_leftovers: files that were removed when it was opened.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str] | None,
        *,
        budget: int = NO_BUDGET,
        compressed: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a store, or make one where there is none.

        Args:
            folder: of the store; made if it does not exist.
            identity: what the KV depends on (weights, dtype, tokenizer, rotation), by name. None
                opens a store that exists, only to look at it or to remove from it.
            budget: most bytes of KV files.
            compressed: whether new files take a byte per number; what was written before is read
                as it is.
            clock: seconds since 1970.

        Raises:
            StoreError: if it is in use, damaged, no store, of a newer version, or holds KV of
                another model.
        """
        self.budget = budget
        self.folder = folder
        self._compressed = compressed
        self._files = folder / KV
        self._clock = clock
        with storage_errors(folder):
            check_folder(folder, may_make=identity is not None)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = take_lock(folder / LOCK)
            try:
                self._files.mkdir(mode=0o700, exist_ok=True)
                has_files = bool(self._names_on_disk())
                self.index = SessionIndex(folder / INDEX, identity, has_files=has_files)
                self.num_leftovers = self._remove_leftovers()
            except BaseException:
                os.close(self._lock)
                raise
        _open_stores.add(self)

    def _names_on_disk(self) -> set[str]:
        """Names of all files of KV, also those that are half written; not what else lies there."""
        return set(filter(is_kv_name, os.listdir(self._files)))

    def _remove_leftovers(self) -> int:
        """Remove files that no transaction has named; return how many."""
        named = {self.index.file(file).name for file in self.index.file_ids()}
        leftovers = self._names_on_disk() - named
        self._unlink(leftovers)
        return len(leftovers)

    def close(self) -> None:
        """Let others open it."""
        _open_stores.discard(self)
        self.index.close()
        os.close(self._lock)

    def leave_to_parent(self) -> None:
        """Keep nothing of it in a process that was forked; nothing else may be called there then.

        The lock is the parent's for as long as the parent wants it, and no longer.
        """
        os.close(self._lock)
        self.index.leave_to_parent()

    def __enter__(self) -> "DiskStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Of all KV files; on any thread."""
        return self.index.num_bytes

    def session(self, key: SessionKey) -> StoredSession | None:
        """A session, or None if there is none of that name; see `SessionIndex.session`."""
        return self.index.session(key)

    # -- files --------------------------------------------------------------------------------

    def read(self, file: WrittenFile) -> KVRows:
        """Read a file's rows; from any thread.

        Raises:
            CorruptFileError: if it is missing or damaged.
        """
        return read_rows(self._files, file)

    def write(self, rows: KVRows) -> tuple[FileId, WrittenFile]:
        """Write rows; the file lasts once `commit` has named it.

        Raises:
            StoreError: if the disk cannot be written.
        """
        # Drawn, so that none is ever used again for something else.
        file = FileId(secrets.randbits(62))
        return file, write_rows(self._files, rows, compressed=self._compressed)

    def discard(self, files: Iterable[WrittenFile]) -> None:
        """Remove files that were written and not named; from any thread."""
        self._unlink(file.name for file in files)

    def discard_unnamed(self, files: Mapping[FileId, WrittenFile]) -> None:
        """Remove files that were written, but for those that have been named.

        If the index cannot be read they stay, and go when the store is opened again.
        """
        with contextlib.suppress(StoreError):
            self.index.read_files()  # a commit that has failed may have named them
            named = self.index.file_ids()
            self.discard(written for file, written in files.items() if file not in named)

    def _unlink(self, names: Iterable[str]) -> None:
        for name in filter(is_kv_name, names):  # an index that is damaged may say anything
            with contextlib.suppress(OSError):  # a leftover, then
                (self._files / name).unlink()

    # -- sessions -----------------------------------------------------------------------------

    def commit(
        self,
        key: SessionKey,
        *,
        round_number: int,
        state: bytes,
        caches: Mapping[str, CacheRecord],
        files: Mapping[FileId, WrittenFile],
        segments: tuple[SegmentRecord, ...] = (),
        ttl_s: float | None = None,
    ) -> None:
        """Make a session durable as it is now, in place of what it was.

        Args as in `StoredSession`; `files` are those written since the last time.

        Raises:
            StoreError: if the index cannot be written; the session is then as it was before.
        """
        if files:
            with storage_errors(self._files):
                flush_folder(self._files)
        # A clock may be set back: no session shall look older than one that was stored before it.
        used_s = max(self._clock(), self.index.last_used_s)
        session = StoredSession(key, round_number, state, caches, segments, used_s, ttl_s)
        self._unlink(self.index.put(session, files))

    def remove(self, key: SessionKey) -> bool:
        """Remove a session and what only it refers to; say whether there was one."""
        existed, names = self.index.remove(key)
        self._unlink(names)
        return existed

    def drop_kv(self, key: SessionKey) -> None:
        """Remove a session's KV and keep what it says; it is computed again when it goes on."""
        self._unlink(self.index.drop_kv(key))

    def forget_file(self, file: FileId) -> None:
        """Take a damaged file out: caches keep what stands before its first token."""
        self._unlink(self.index.forget_file(file))

    def make_room(self, num_bytes: int, keep: SessionKey | None) -> bool:
        """Drop KV of other sessions until so many more bytes fit the budget; say if they do.

        Sessions past their time go first, whole; then the KV of those used longest ago.
        """
        self.remove_expired(keep)
        if self.num_bytes + num_bytes > self.budget:
            for key in self.index.keys_with_kv():
                if key != keep:
                    self.drop_kv(key)
                if self.num_bytes + num_bytes <= self.budget:
                    break
        return self.num_bytes + num_bytes <= self.budget

    def remove_expired(self, keep: SessionKey | None = None) -> list[SessionKey]:
        """Remove sessions that have outlived their time; return them."""
        expired = [key for key in self.index.expired(self._clock()) if key != keep]
        for key in expired:
            self.remove(key)
        return expired

    # -- checking -----------------------------------------------------------------------------

    def verify(self) -> list[Problem]:
        """Read everything, and say what is not as it was written."""
        problems: list[Problem] = []
        for file in sorted(self.index.file_ids()):
            try:
                self.read(self.index.file(file))
            except CorruptFileError as error:
                problems.append(Problem(str(error), file))
        return problems + self.index.damage()

    def check_integrity(self) -> None:
        """Assert that index, files and budget agree."""
        named = [self.index.file(file) for file in self.index.file_ids()]
        assert {file.name for file in named} == self._names_on_disk()
        for file in named:
            assert (self._files / file.name).stat().st_size == file.num_bytes
        assert self.num_bytes <= self.budget
        self.index.check_integrity()


_open_stores: "weakref.WeakSet[DiskStore]" = weakref.WeakSet()


def _leave_stores_to_parent() -> None:
    for store in list(_open_stores):
        store.leave_to_parent()


if hasattr(os, "register_at_fork"):  # where processes can be forked
    os.register_at_fork(after_in_child=_leave_stores_to_parent)
