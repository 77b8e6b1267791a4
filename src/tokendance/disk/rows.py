"""A session as rows of the index: one in `sessions`, one in `caches` for each cache and segment.

Every row carries a checksum of its fields, as files do of their bytes, so a byte that has flipped
is found wherever it is. The functions run inside whatever transaction is open.
"""

import sqlite3
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
    def segment(self) -> SegmentRecord | None:
        """What the row says of a shared segment, if it is one's."""
        if self.run is None or self.place is None or self.rounds is None:
            return None
        return SegmentRecord(self.cache, self.run, self.place, self.rounds)

    @property
    def checksum(self) -> bytes:
        return _checksum(*self)


_COLUMNS = ", ".join(_CacheRow._fields)


def session_id(database: sqlite3.Connection, key: SessionKey) -> int | None:
    """The row of a session, or None if there is none of that name."""
    row = database.execute(
        "SELECT id FROM sessions WHERE tenant = ? AND name = ?", (key.tenant, key.name)
    ).fetchone()
    return None if row is None else int(row[0])


def read_session(database: sqlite3.Connection, key: SessionKey) -> StoredSession | None:
    """Read a session, or None if there is none of that name. Caches that are damaged are left out.

    Raises:
        CorruptFileError: if its state is damaged.
    """
    row = database.execute(
        "SELECT id, round, state, used_s, ttl_s, checksum FROM sessions"
        " WHERE tenant = ? AND name = ?",
        (key.tenant, key.name),
    ).fetchone()
    if row is None:
        return None
    number, round_number, state, used_s, ttl_s, checksum = row
    if _checksum(key.tenant, key.name, round_number, state) != checksum:
        raise CorruptFileError(
            f"What is stored of the session {key.name!r} is damaged. Remove it with "
            "`tokendance store rm`, or put a copy of the index back."
        )
    caches: dict[str, CacheRecord] = {}
    segments: list[SegmentRecord] = []
    for *fields, checksum in database.execute(
        f"SELECT {_COLUMNS}, checksum FROM caches WHERE session = ? ORDER BY id", (number,)
    ):
        cache_row = _CacheRow(*fields)
        if cache_row.checksum != checksum:
            continue
        segment = cache_row.segment
        if segment is None:
            caches[cache_row.agent] = cache_row.cache
        else:
            segments.append(segment)
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
            key.tenant,
            key.name,
            session.round,
            session.state,
            session.used_s,
            session.ttl_s,
            _checksum(key.tenant, key.name, session.round, session.state),
        ),
    )
    number = session_id(database, key)
    database.execute("DELETE FROM caches WHERE session = ?", (number,))
    rows = [_CacheRow.of(agent, cache) for agent, cache in session.caches.items()]
    rows += [_CacheRow.of("", segment.cache, segment) for segment in session.segments]
    marks = ", ".join("?" * (len(_CacheRow._fields) + 2))
    for row in rows:
        cursor = database.execute(
            f"INSERT INTO caches (session, {_COLUMNS}, checksum) VALUES ({marks})",
            (number, *row, row.checksum),
        )
        assert cursor.lastrowid is not None
        _insert_refs(database, cursor.lastrowid, row.extents)


def cut_caches(database: sqlite3.Connection, file: FileId) -> None:
    """Let every cache that refers to a file end before its first token that is in it."""
    for number, *fields in database.execute(
        f"SELECT id, {_COLUMNS} FROM caches JOIN refs ON cache = id WHERE file = ?", (file,)
    ).fetchall():
        row = _CacheRow(*fields)
        if row.run is not None:  # a shared segment is there whole, or not at all
            database.execute("DELETE FROM caches WHERE id = ?", (number,))
            continue
        row = row.cut_before(file)
        database.execute(
            "UPDATE caches SET token_ids = ?, num_exact = ?, num_prompt = ?, pieces = ?,"
            " checksum = ? WHERE id = ?",
            (row.token_ids, row.num_exact, row.num_prompt, row.pieces, row.checksum, number),
        )
        database.execute("DELETE FROM refs WHERE cache = ?", (number,))
        _insert_refs(database, number, row.extents)


def _insert_refs(database: sqlite3.Connection, cache: int, extents: Extents) -> None:
    database.executemany(
        "INSERT INTO refs VALUES (?, ?)",
        [(cache, file) for file in np.unique(extents[:, 0]).tolist()],
    )


def _checksum(*fields: object) -> bytes:
    """Of the fields of a row, their boundaries included."""
    return checksum_of(repr(fields).encode())
