"""The index of a store: which sessions it has, where their caches are, and the files of KV.

It is an SQLite file. What its tables are is in `schema.py`, and how a session becomes rows of them
in `rows.py`.

One thread at a time may use it; a change waits for the disk, some 50 ms. Which files there are is
kept in memory beside it, so any thread can look at that at any time and waits for nobody.
"""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import FileId, Problem, SessionKey, StoredSession, StoreUsage
from tokendance.disk.rows import SESSION_ID, cut_caches, read_session, remove_caches, write_session
from tokendance.disk.schema import open_database, storage_errors, transaction
from tokendance.errors import CorruptFileError


class SessionIndex:
    """Sessions, caches and files of one store; see the module.

    All methods raise a `StoreError` if the index cannot be read or written. Those about files,
    which say so, may be called on any thread.

    Attributes:
        path: of the SQLite file.
        num_bytes: of all KV files, as of the last change; on any thread.
    """

    def __init__(self, path: Path, identity: Mapping[str, str] | None, *, has_files: bool) -> None:
        """Open an index, or make one; see `open_database`."""
        self.path = path
        with storage_errors(path):
            self._database = open_database(path, identity, has_files=has_files)
        try:
            self.read_files()
        except BaseException:
            self._database.close()
            raise

    def read_files(self) -> None:
        """Look anew which files there are."""
        rows = self._select("SELECT id, name, num_rows, num_bytes, checksum FROM files")
        self._files = {FileId(file): WrittenFile(*written) for file, *written in rows}
        self.num_bytes = sum(written.num_bytes for written in self._files.values())

    def close(self) -> None:
        """Let go of it."""
        self._database.close()

    def leave_to_parent(self) -> None:
        """Never close it, in a process that was forked.

        SQLite forbids that: to close it might undo what the parent is about to write. So it gets a
        reference that nobody gives back, also at the end of the process.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))

    # -- looking ------------------------------------------------------------------------------

    def _select(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with storage_errors(self.path):
            return self._database.execute(statement, values).fetchall()

    def _select_keys(self, which: str, *values: object) -> list[SessionKey]:
        rows = self._select(f"SELECT tenant, name FROM sessions {which}", *values)
        return [SessionKey(*row) for row in rows]

    @property
    def row_bytes(self) -> float:
        """Bytes of a token's KV, on average over all files."""
        num_rows = sum(written.num_rows for written in self._files.values())
        return self.num_bytes / num_rows if num_rows else 0.0

    def session_keys(self) -> list[SessionKey]:
        """All sessions, those used last first."""
        return self._select_keys("ORDER BY used_s DESC")

    def keys_with_kv(self) -> list[SessionKey]:
        """Sessions that have KV, those stored longest ago first, whatever a clock has said."""
        # Whoever is stored has all its caches written anew, under higher numbers.
        return self._select_keys(
            "JOIN (SELECT session, max(id) AS newest FROM caches GROUP BY session)"
            " ON session = sessions.id ORDER BY newest"
        )

    @property
    def last_used_s(self) -> float:
        """When any session was used last, in seconds since 1970; 0 if there is none."""
        ((used_s,),) = self._select("SELECT max(used_s) FROM sessions")
        return used_s or 0.0

    def expired(self, now_s: float) -> list[SessionKey]:
        """Sessions that have outlived their time."""
        return self._select_keys("WHERE ttl_s IS NOT NULL AND used_s + ttl_s < ?", now_s)

    def session(self, key: SessionKey) -> StoredSession | None:
        """A session, or None if there is none of that name. Caches that are damaged are left out.

        Raises:
            CorruptFileError: if its state is damaged.
        """
        with storage_errors(self.path):
            return read_session(self._database, key)

    def usage(self, key: SessionKey) -> StoreUsage:
        """What a session takes; files that it shares with others count whole."""
        session = self.session(key)
        caches = session.caches.values() if session is not None else ()
        dense_rows = sum(len(cache.token_ids) for cache in caches)
        ((num_files, num_rows, num_bytes),) = self._select(
            "SELECT count(*), total(num_rows), total(num_bytes) FROM files WHERE id IN"
            " (SELECT file FROM refs JOIN caches ON cache = caches.id"
            f"  WHERE session = {SESSION_ID})",
            *astuple(key),
        )
        return StoreUsage(num_files, int(num_rows), dense_rows, int(num_bytes))

    def readers(self, key: SessionKey) -> dict[FileId, tuple[int, list[str]]]:
        """For each file of a session its rows, and the agents whose caches refer to it."""
        readers: dict[FileId, tuple[int, list[str]]] = {}
        for file, num_rows, agent in self._select(
            "SELECT files.id, num_rows, agent FROM files JOIN refs ON file = files.id"
            f" JOIN caches ON cache = caches.id WHERE session = {SESSION_ID} AND run IS NULL"
            " ORDER BY files.id, caches.id",
            *astuple(key),
        ):
            readers.setdefault(FileId(file), (num_rows, []))[1].append(agent)
        return readers

    def file_ids(self) -> set[FileId]:
        """All files that the index names; on any thread."""
        return set(self._files)

    def own_files(self, key: SessionKey) -> set[FileId]:
        """Files that this session, and no other, refers to."""
        rows = self._select(
            f"SELECT file FROM refs JOIN caches ON cache = caches.id WHERE session = {SESSION_ID}"
            " AND NOT EXISTS (SELECT 1 FROM refs AS others JOIN caches AS theirs"
            "  ON others.cache = theirs.id"
            f" WHERE others.file = refs.file AND theirs.session <> {SESSION_ID})",
            *astuple(key),
        )
        return {FileId(file) for (file,) in rows}

    def file(self, file: FileId) -> WrittenFile:
        """What the index says of a file; on any thread.

        Raises:
            CorruptFileError: if there is none.
        """
        if (written := self._files.get(file)) is None:
            raise CorruptFileError(f"The store has no file {file}. What it held is computed again.")
        return written

    def damage(self) -> list[Problem]:
        """What of sessions and caches is not as it was written."""
        problems: list[Problem] = []
        for key in self.session_keys():
            try:
                session = self.session(key)
            except CorruptFileError as error:
                problems.append(Problem(str(error)))
                continue
            agents = self._select(
                f"SELECT agent FROM caches WHERE session = {SESSION_ID} AND run IS NULL",
                *astuple(key),
            )
            problems += [
                Problem(
                    f"What the index says of {agent!r} in the session {key.name!r} is damaged. Its "
                    "KV is computed again."
                )
                for (agent,) in agents
                if session is not None and agent not in session.caches
            ]
        return problems

    # -- changing: each returns the names of files that nothing refers to any more ----------------

    def put(self, session: StoredSession, files: Mapping[FileId, WrittenFile]) -> list[str]:
        """Name new files, and put a session in place of what it was."""
        with self._changing(files) as removed:
            self._database.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
                [
                    (file, written.name, written.num_rows, written.num_bytes, written.checksum)
                    for file, written in files.items()
                ],
            )
            write_session(self._database, session)
        return removed

    def remove(self, key: SessionKey) -> tuple[bool, list[str]]:
        """Remove a session; also say whether there was one."""
        with self._changing() as removed:
            cursor = self._database.execute(
                "DELETE FROM sessions WHERE tenant = ? AND name = ?", astuple(key)
            )
        return cursor.rowcount > 0, removed

    def drop_kv(self, key: SessionKey) -> list[str]:
        """Remove a session's caches."""
        with self._changing() as removed:
            remove_caches(self._database, key)
        return removed

    def forget_file(self, file: FileId) -> list[str]:
        """Take a file out: caches keep what stands before their first token that is in it."""
        with self._changing() as removed:
            cut_caches(self._database, file)
        return removed

    @contextmanager
    def _changing(
        self, added: Mapping[FileId, WrittenFile] = MappingProxyType({})
    ) -> Iterator[list[str]]:
        """A transaction that ends by removing files which no cache refers to any more.

        Args:
            added: files that it names.

        Yields:
            The names of those that are removed, which are there when the transaction has ended.
        """
        unused = "FROM files WHERE id NOT IN (SELECT file FROM refs)"
        removed: list[str] = []
        with storage_errors(self.path), transaction(self._database):
            yield removed
            found = self._database.execute(f"SELECT id, name {unused}").fetchall()
            self._database.execute(f"DELETE {unused}")
        removed += [name for _, name in found]
        self._files.update(added)
        for file, _ in found:
            del self._files[file]
        self.num_bytes = sum(written.num_bytes for written in self._files.values())

    # -- checking -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that caches, their extents and files agree."""
        for key in self.session_keys():
            session = self.session(key)
            assert session is not None
            of_segments = [segment.cache for segment in session.segments]
            for cache in (*session.caches.values(), *of_segments):
                assert int(cache.extents[:, 2].sum()) == len(cache.token_ids)
                assert 0 <= cache.num_exact <= len(cache.token_ids)
                assert 0 <= cache.num_prompt <= len(cache.token_ids)
                for file, first, count in cache.extents.tolist():
                    assert first >= 0
                    assert first + count <= self.file(file).num_rows
        assert not self._select("SELECT id FROM files WHERE id NOT IN (SELECT file FROM refs)")
