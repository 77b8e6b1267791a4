"""A session as rows of the index: one in `sessions`, one in `caches` for each cache and segment.

Every row carries a checksum of its fields, as files do of their bytes, so a byte that has flipped
is found wherever it is. The functions run inside whatever transaction is open.
"""

import sqlite3
from dataclasses import astuple
from typing import NamedTuple

import numpy as np

from tokendance.disk.kv_file import checksum_of
from tokendance.disk.records import (
    CacheRecord,
    Extents,
    FileId,
    SegmentRecord,
    SessionKey,
    StoredSession,
)
from tokendance.errors import CorruptFileError


class _CacheRow(NamedTuple):
    """A row of `caches`: its columns by their names there, but for session and checksum.

    The row of an agent's cache has no `run`, `place` and `rounds`; the row of a shared segment has
    no agent.
    """

    agent: str
    token_ids: bytes  # int32
    num_exact: int
    num_prompt: int
    pieces: bytes  # int64 (n, 3), the extents
    run: int | None
    place: int | None
    rounds: int | None

    @classmethod
    def of(
        cls, agent: str, cache: CacheRecord, segment: SegmentRecord | None = None
    ) -> "_CacheRow":
        return cls(
            agent,
            cache.token_ids.astype(np.int32).tobytes(),
            cache.num_exact,
            cache.num_prompt,
            cache.extents.astype(np.int64).tobytes(),
            *((segment.run, segment.index, segment.num_rounds) if segment else (None,) * 3),
        )

    def cut_before(self, file: FileId) -> "_CacheRow":
        """The row of what stands before the first token that is in a file."""
        extents = self.extents
        kept = extents[: int(np.flatnonzero(extents[:, 0] == file)[0])]
        length = int(kept[:, 2].sum())
        return self._replace(
            token_ids=self.token_ids[: 4 * length],
            num_exact=min(self.num_exact, length),
            num_prompt=min(self.num_prompt, length),
            pieces=kept.tobytes(),
        )

    @property
    def extents(self) -> Extents:
        return np.frombuffer(self.pieces, np.int64).reshape(-1, 3)

    @property
    def cache(self) -> CacheRecord:
        token_ids = np.frombuffer(self.token_ids, np.int32)
        return CacheRecord(token_ids, self.num_exact, self.num_prompt, self.extents)

    @property
    def checksum(self) -> bytes:
        return _checksum(*self)


_COLUMNS = ", ".join(_CacheRow._fields)

SESSION_ID = "(SELECT id FROM sessions WHERE tenant = ?1 AND name = ?2)"
"""The row of a session, for statements whose first two values are its tenant and name."""


def read_session(database: sqlite3.Connection, key: SessionKey) -> StoredSession | None:
    """Read a session, or None if there is none of that name. Caches that are damaged are left out.

    Raises:
        CorruptFileError: if its state is damaged.
    """
    found = database.execute(
        "SELECT id, round, state, used_s, ttl_s, checksum FROM sessions"
        " WHERE tenant = ? AND name = ?",
        astuple(key),
    ).fetchone()
    if found is None:
        return None
    number, round_number, state, used_s, ttl_s, checksum = found
    if _checksum(*astuple(key), round_number, state) != checksum:
        raise CorruptFileError(
            f"What is stored of the session {key.name!r} is damaged. Remove it with "
            "`tokendance store rm`, or put a copy of the index back."
        )
    caches: dict[str, CacheRecord] = {}
    segments: list[SegmentRecord] = []
    for *fields, checksum in database.execute(
        f"SELECT {_COLUMNS}, checksum FROM caches WHERE session = ? ORDER BY id", (number,)
    ):
        row = _CacheRow(*fields)
        if row.checksum != checksum:
            continue
        if row.run is None or row.place is None or row.rounds is None:
            caches[row.agent] = row.cache
        else:
            segments.append(SegmentRecord(row.cache, row.run, row.place, row.rounds))
    return StoredSession(key, round_number, state, caches, tuple(segments), used_s, ttl_s)


def write_session(database: sqlite3.Connection, session: StoredSession) -> None:
    """Write a session in place of what it was; its files are named already."""
    key = session.key
    database.execute(
        "INSERT INTO sessions (tenant, name, round, state, used_s, ttl_s, checksum)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, name) DO UPDATE SET"
        " round = excluded.round, state = excluded.state, used_s = excluded.used_s,"
        " ttl_s = excluded.ttl_s, checksum = excluded.checksum",
        (
            *astuple(key),
            session.round,
            session.state,
            session.used_s,
            session.ttl_s,
            _checksum(*astuple(key), session.round, session.state),
        ),
    )
    remove_caches(database, key)
    (number,) = database.execute(f"SELECT {SESSION_ID}", astuple(key)).fetchone()
    for agent, cache in session.caches.items():
        _insert(database, None, number, _CacheRow.of(agent, cache))
    for segment in session.segments:
        _insert(database, None, number, _CacheRow.of("", segment.cache, segment))


def remove_caches(database: sqlite3.Connection, key: SessionKey) -> None:
    """Remove all caches and segments of a session."""
    database.execute(f"DELETE FROM caches WHERE session = {SESSION_ID}", astuple(key))


def cut_caches(database: sqlite3.Connection, file: FileId) -> None:
    """Let every cache that refers to a file end before its first token that is in it."""
    for number, session, *fields in database.execute(
        f"SELECT id, session, {_COLUMNS} FROM caches JOIN refs ON cache = id WHERE file = ?",
        (file,),
    ).fetchall():
        row = _CacheRow(*fields)
        database.execute("DELETE FROM caches WHERE id = ?", (number,))
        if row.run is None:  # a shared segment is there whole, or not at all
            _insert(database, number, session, row.cut_before(file))


def _insert(database: sqlite3.Connection, number: int | None, session: int, row: _CacheRow) -> None:
    """Insert a cache, under a new number for None, and what files it refers to."""
    values = (number, session, *row, row.checksum)
    marks = ", ".join("?" * len(values))
    cursor = database.execute(
        f"INSERT INTO caches (id, session, {_COLUMNS}, checksum) VALUES ({marks})", values
    )
    database.executemany(
        "INSERT INTO refs VALUES (?, ?)",
        [(cursor.lastrowid, file) for file in np.unique(row.extents[:, 0]).tolist()],
    )


def _checksum(*fields: object) -> bytes:
    """Of the fields of a row, their boundaries included."""
    return checksum_of(repr(fields).encode())
