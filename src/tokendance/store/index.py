"""The index of the disk tier: sessions, their caches, and files, in SQLite.

Every change is one transaction, flushed before it returns. Rows of sessions and caches carry
checksums, as files do, so a byte that has flipped is found wherever it is.
"""

import functools
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from tokendance.errors import CorruptFileError, StoreError
from tokendance.store.kv_file import WrittenFile, checksum_of
from tokendance.store.records import (
    CacheRecord,
    CopyRecord,
    FileId,
    Problem,
    SessionKey,
    StoredSession,
    StoreUsage,
)

VERSION = 1

# How long another program that looks at the index may keep a change waiting, and whoever runs the
# engine with it.
_LOCKED_S = 5.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    round INTEGER NOT NULL,
    state BLOB NOT NULL,
    used_s REAL NOT NULL,
    ttl_s REAL,
    checksum BLOB NOT NULL,
    UNIQUE (tenant, name)
);
CREATE TABLE caches (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    agent TEXT NOT NULL,
    token_ids BLOB NOT NULL,
    num_exact INTEGER NOT NULL,
    num_prompt INTEGER NOT NULL,
    pieces BLOB NOT NULL,
    run INTEGER,
    place INTEGER,
    rounds INTEGER,
    checksum BLOB NOT NULL
);
CREATE INDEX caches_by_session ON caches (session);
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    num_rows INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    checksum BLOB NOT NULL
);
CREATE TABLE refs (
    cache INTEGER NOT NULL REFERENCES caches (id) ON DELETE CASCADE,
    file INTEGER NOT NULL REFERENCES files (id),
    PRIMARY KEY (cache, file)
) WITHOUT ROWID;
CREATE INDEX refs_by_file ON refs (file);
"""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _told(method: _Method) -> _Method:
    """Turn what SQLite raises in a method into a sentence."""

    @functools.wraps(method)
    def wrapper(self: "SessionIndex", *args: Any, **named: Any) -> Any:
        with told(self.path):
            return method(self, *args, **named)

    return cast(_Method, wrapper)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the disk and SQLite raise into sentences; `path` is what they are about."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError, LookupError) as error:
        if "full" in str(error):
            raise StoreError(
                f"The disk of {path} is full. What was stored before is unharmed; make room."
            ) from error
        if "locked" in str(error):
            raise StoreError(
                f"{path} is being read by another program, which has to end first. What was stored "
                "before is unharmed."
            ) from error
        raise StoreError(
            f"{path} is damaged ({error}). Put a copy of it back, or use another folder."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be used: {error.strerror}. Give --store a folder that can be."
        ) from error


class SessionIndex:
    """Sessions, caches and files of one store; see the module.

    Attributes:
        path: of the index.
    """

    def __init__(self, path: Path, identity: Mapping[str, str] | None, *, has_files: bool) -> None:
        """Open an index, or make one.

        Args:
            path: of it.
            identity: see `DiskStore`.
            has_files: whether there are files that it should name.

        Raises:
            StoreError: if it is damaged, of a newer version, or of another model.
        """
        self.path = path
        with told(path):
            self._index = self._open(identity, has_files)

    def close(self) -> None:
        """Let go of it."""
        self._index.close()

    def _open(self, identity: Mapping[str, str] | None, has_files: bool) -> sqlite3.Connection:
        path = self.path
        is_new = not path.exists()
        if is_new:  # so that nobody else can read it from its first byte on
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        index = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=_LOCKED_S
        )
        try:
            index.execute("PRAGMA synchronous = FULL")
            index.execute("PRAGMA foreign_keys = ON")
            if not index.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                # New, or its maker ended before the first transaction did.
                if has_files:
                    raise StoreError(
                        f"{path} is empty, and there are files of KV that it should name. Put a "
                        "copy of it back, or remove the folder."
                    )
                with _transaction(index):
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        index.execute(statement)
                    meta = {"version": str(VERSION), "identity": json.dumps(dict(identity or {}))}
                    index.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            (found,) = index.execute("PRAGMA integrity_check").fetchone()
            ((pages,), (size,)) = (
                index.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
            )
            if found == "ok" and path.stat().st_size != pages * size:
                found = "a part of it is missing"
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            meta = dict(index.execute("SELECT key, value FROM meta"))
        except BaseException:
            index.close()
            raise
        self._check_meta(meta, identity)
        return index

    def _check_meta(self, meta: Mapping[str, str], identity: Mapping[str, str] | None) -> None:
        try:
            version, theirs = int(meta["version"]), dict(json.loads(meta["identity"]))
        except (KeyError, ValueError, TypeError):
            raise sqlite3.DatabaseError("it does not say what it is") from None
        if version > VERSION:
            raise StoreError(
                f"{self.path.parent} was written by a newer version of TokenDance (format "
                f"{version}, and this one reads up to {VERSION}). Use that version, or another "
                "folder."
            )
        if identity is None:
            return
        different = sorted(
            name for name in {*theirs, *identity} if theirs.get(name) != identity.get(name)
        )
        if different:
            raise StoreError(
                f"{self.path.parent} holds KV of another model: {', '.join(different)} differ "
                f"({theirs.get('shape')}, {theirs.get('dtype')} there). Give --store another "
                "folder."
            )

    # -- looking ------------------------------------------------------------------------------

    @property
    @_told
    def num_bytes(self) -> int:
        """Of all KV files."""
        (found,) = self._index.execute("SELECT total(num_bytes) FROM files").fetchone()
        return int(found)

    @property
    @_told
    def row_bytes(self) -> float:
        """Of a token's KV, on average over all files."""
        row = self._index.execute("SELECT total(num_bytes), total(num_rows) FROM files").fetchone()
        return float(row[0]) / float(row[1]) if row[1] else 0.0

    @_told
    def session_keys(self) -> list[SessionKey]:
        """All sessions, those used last first."""
        rows = self._index.execute("SELECT tenant, name FROM sessions ORDER BY used_s DESC")
        return [SessionKey(*row) for row in rows]

    @_told
    def keys_with_kv(self) -> list[SessionKey]:
        """Sessions that have KV, those used longest ago first."""
        rows = self._index.execute(
            "SELECT tenant, name FROM sessions WHERE id IN (SELECT session FROM caches)"
            " ORDER BY used_s"
        )
        return [SessionKey(*row) for row in rows]

    @_told
    def session(self, key: SessionKey) -> StoredSession | None:
        """A session, or None if there is none of that name. Caches that are damaged are left out.

        Raises:
            CorruptFileError: if what it has said is damaged.
        """
        row = self._index.execute(
            "SELECT id, round, state, used_s, ttl_s, checksum FROM sessions"
            " WHERE tenant = ? AND name = ?",
            (key.tenant, key.name),
        ).fetchone()
        if row is None:
            return None
        if _checksum(key.tenant, key.name, row[1], row[2]) != row[5]:
            raise CorruptFileError(
                f"What is stored of the session {key.name!r} is damaged. Remove it with "
                "`tokendance store rm`, or put a copy of the index back."
            )
        caches: dict[str, CacheRecord] = {}
        copies: list[CopyRecord] = []
        for *content, checksum in self._index.execute(
            "SELECT agent, token_ids, num_exact, num_prompt, pieces, run, place, rounds, checksum"
            " FROM caches WHERE session = ? ORDER BY id",
            (row[0],),
        ):
            if _checksum(*content) != checksum:
                continue
            agent, token_ids, num_exact, num_prompt, pieces, *place = content
            cache = CacheRecord(
                np.frombuffer(token_ids, np.int32),
                num_exact,
                num_prompt,
                np.frombuffer(pieces, np.int64).reshape(-1, 3),
            )
            if place[0] is None:
                caches[agent] = cache
            else:
                copies.append(CopyRecord(cache, *place))
        return StoredSession(key, row[1], row[2], caches, tuple(copies), row[3], row[4])

    @_told
    def usage(self, key: SessionKey) -> StoreUsage:
        """What a session takes; files that it shares with others count whole."""
        session = self.session(key)
        dense = sum(len(cache.token_ids) for cache in session.caches.values()) if session else 0
        row = self._index.execute(
            "SELECT count(*), total(num_rows), total(num_bytes) FROM files WHERE id IN"
            " (SELECT file FROM refs JOIN caches ON cache = caches.id"
            "  JOIN sessions ON session = sessions.id WHERE tenant = ? AND sessions.name = ?)",
            (key.tenant, key.name),
        ).fetchone()
        return StoreUsage(int(row[0]), int(row[1]), dense, int(row[2]))

    @_told
    def readers(self, key: SessionKey) -> dict[FileId, tuple[int, list[str]]]:
        """For each file of a session its rows, and the agents whose caches refer to it."""
        found: dict[FileId, tuple[int, list[str]]] = {}
        for file, num_rows, agent in self._index.execute(
            "SELECT files.id, num_rows, agent FROM files JOIN refs ON file = files.id"
            " JOIN caches ON cache = caches.id JOIN sessions ON session = sessions.id"
            " WHERE tenant = ? AND sessions.name = ? AND run IS NULL"
            " ORDER BY files.id, caches.id",
            (key.tenant, key.name),
        ):
            found.setdefault(FileId(file), (num_rows, []))[1].append(agent)
        return found

    @_told
    def file_ids(self) -> set[FileId]:
        """All files that the index names."""
        return {FileId(file) for (file,) in self._index.execute("SELECT id FROM files")}

    @_told
    def own_files(self, key: SessionKey) -> set[FileId]:
        """Files that this session, and no other, refers to."""
        rows = self._index.execute(
            "SELECT DISTINCT file FROM refs JOIN caches ON cache = caches.id WHERE session = ?1"
            " AND NOT EXISTS (SELECT 1 FROM refs AS others JOIN caches AS theirs"
            "  ON others.cache = theirs.id WHERE others.file = refs.file AND theirs.session <> ?1)",
            (self._id(key),),
        )
        return {FileId(file) for (file,) in rows}

    @_told
    def file(self, file: FileId) -> WrittenFile:
        """What the index says of a file.

        Raises:
            CorruptFileError: if there is none.
        """
        row = self._index.execute(
            "SELECT name, num_rows, num_bytes, checksum FROM files WHERE id = ?", (file,)
        ).fetchone()
        if row is None:
            raise CorruptFileError(f"The store has no file {file}. What it held is computed again.")
        return WrittenFile(*row)

    @_told
    def damage(self) -> list[Problem]:
        """What of sessions and caches is not as it was written."""
        problems: list[Problem] = []
        for key in self.session_keys():
            try:
                session = self.session(key)
            except CorruptFileError as error:
                problems.append(Problem(str(error)))
                continue
            listed = self._index.execute(
                "SELECT agent FROM caches WHERE session = ? AND run IS NULL", (self._id(key),)
            )
            problems += [
                Problem(
                    f"What the index says of {agent!r} in the session {key.name!r} is damaged. Its "
                    "KV is computed again."
                )
                for (agent,) in listed
                if session is not None and agent not in session.caches
            ]
        return problems

    def _id(self, key: SessionKey) -> int | None:
        row = self._index.execute(
            "SELECT id FROM sessions WHERE tenant = ? AND name = ?", (key.tenant, key.name)
        ).fetchone()
        return None if row is None else int(row[0])

    # -- changing: each returns the names of files that nothing refers to any more ----------------

    @_told
    def put(self, session: StoredSession, files: Mapping[FileId, WrittenFile]) -> list[str]:
        """Name new files, and put a session in place of what it was."""
        key = session.key
        with self._changing() as (index, removed):
            index.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
                [
                    (file, one.name, one.num_rows, one.num_bytes, one.checksum)
                    for file, one in files.items()
                ],
            )
            index.execute(
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
            number = self._id(key)
            index.execute("DELETE FROM caches WHERE session = ?", (number,))
            records: list[tuple[str, CacheRecord, tuple[int | None, ...]]] = [
                (agent, cache, (None, None, None)) for agent, cache in session.caches.items()
            ]
            records += [
                ("", copy.cache, (copy.run, copy.place, copy.rounds)) for copy in session.copies
            ]
            for agent, cache, place in records:
                content = (
                    agent,
                    cache.token_ids.astype(np.int32).tobytes(),
                    cache.num_exact,
                    cache.num_prompt,
                    cache.pieces.astype(np.int64).tobytes(),
                    *place,
                )
                row = index.execute(
                    "INSERT INTO caches (session, agent, token_ids, num_exact, num_prompt, pieces,"
                    " run, place, rounds, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (number, *content, _checksum(*content)),
                )
                index.executemany(
                    "INSERT INTO refs VALUES (?, ?)",
                    [(row.lastrowid, file) for file in np.unique(cache.pieces[:, 0]).tolist()],
                )
        return removed

    @_told
    def remove(self, key: SessionKey) -> tuple[bool, list[str]]:
        """Remove a session; also say whether there was one."""
        with self._changing() as (index, removed):
            done = index.execute(
                "DELETE FROM sessions WHERE tenant = ? AND name = ?", (key.tenant, key.name)
            )
        return done.rowcount > 0, removed

    @_told
    def drop_kv(self, key: SessionKey) -> list[str]:
        """Remove a session's caches."""
        with self._changing() as (index, removed):
            index.execute("DELETE FROM caches WHERE session = ?", (self._id(key),))
        return removed

    @_told
    def forget_file(self, file: FileId) -> list[str]:
        """Take a file out: caches keep what stands before its first token."""
        with self._changing() as (index, removed):
            rows = index.execute(
                "SELECT id, agent, token_ids, num_exact, num_prompt, pieces, run, place, rounds"
                " FROM caches JOIN refs ON cache = id WHERE file = ?",
                (file,),
            ).fetchall()
            for cache, agent, token_ids, num_exact, num_prompt, blob, *place in rows:
                if place[0] is not None:  # a copy of a segment is there whole, or not at all
                    index.execute("DELETE FROM caches WHERE id = ?", (cache,))
                    continue
                pieces = np.frombuffer(blob, np.int64).reshape(-1, 3)
                kept = pieces[: int(np.flatnonzero(pieces[:, 0] == file)[0])]
                length = int(kept[:, 2].sum())
                content = (
                    token_ids[: 4 * length],
                    min(num_exact, length),
                    min(num_prompt, length),
                    kept.tobytes(),
                )
                index.execute(
                    "UPDATE caches SET token_ids = ?, num_exact = ?, num_prompt = ?, pieces = ?,"
                    " checksum = ? WHERE id = ?",
                    (*content, _checksum(agent, *content, *place), cache),
                )
                index.execute("DELETE FROM refs WHERE cache = ?", (cache,))
                index.executemany(
                    "INSERT INTO refs VALUES (?, ?)",
                    [(cache, int(one)) for one in np.unique(kept[:, 0])],
                )
        return removed

    @_told
    def expired(self, now_s: float) -> list[SessionKey]:
        """Sessions that have outlived their time."""
        rows = self._index.execute(
            "SELECT tenant, name FROM sessions WHERE ttl_s IS NOT NULL AND used_s + ttl_s < ?",
            (now_s,),
        )
        return [SessionKey(*row) for row in rows.fetchall()]

    @contextmanager
    def _changing(self) -> Iterator[tuple[sqlite3.Connection, list[str]]]:
        """A transaction, which ends with forgetting files that no cache refers to any more."""
        unused = "FROM files WHERE id NOT IN (SELECT file FROM refs)"
        removed: list[str] = []
        with _transaction(self._index) as index:
            yield index, removed
            removed += [name for (name,) in index.execute(f"SELECT name {unused}")]
            index.execute(f"DELETE {unused}")

    # -- checking -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that caches, pieces and files agree."""
        for key in self.session_keys():
            session = self.session(key)
            assert session is not None
            for cache in (*session.caches.values(), *(copy.cache for copy in session.copies)):
                assert int(cache.pieces[:, 2].sum()) == len(cache.token_ids)
                assert 0 <= cache.num_exact <= len(cache.token_ids)
                assert 0 <= cache.num_prompt <= len(cache.token_ids)
                for file, first, count in cache.pieces.tolist():
                    assert first >= 0
                    assert first + count <= self.file(file).num_rows
        (unused,) = self._index.execute(
            "SELECT count(*) FROM files WHERE id NOT IN (SELECT file FROM refs)"
        ).fetchone()
        assert unused == 0


def _checksum(*fields: object) -> bytes:
    """Of the fields of a row, their boundaries included."""
    return checksum_of(repr(fields).encode())


@contextmanager
def _transaction(index: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    index.execute("BEGIN IMMEDIATE")
    try:
        yield index
        index.execute("COMMIT")
    except BaseException:
        if index.in_transaction:  # SQLite may have ended it, as when the disk is full
            index.execute("ROLLBACK")
        raise
