"""The tables of a store's index, and what has to hold before any of them is read.

An index is opened only if it is whole, of a version that this code reads, and of the model whose KV
the caller makes. Every change of it is one transaction, flushed before it returns.
"""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tokendance.errors import StoreError

_VERSION = 1

# How long opening waits for another program that uses the index. Nothing waits later.
_LOCKED_S = 5.0

# The names in it are those of format 1: `pieces` are extents, `place` is an index in a run.
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


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk and SQLite raise about `path` into a `StoreError` with a plain message."""
    try:
        yield
    except (OSError, sqlite3.Error, UnicodeDecodeError, LookupError) as error:
        raise StoreError(_say(error, path)) from error


_UNHARMED = "What was stored before is unharmed"


def _say(error: Exception, path: Path) -> str:
    """What an error of the disk, of SQLite, or of reading what is there means for `path`."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"The disk of {path} is full: {error.strerror}. {_UNHARMED}; make room."
        if error.errno == errno.EFBIG:
            return (
                f"{path} cannot grow: this process may not write files of that size (ulimit -f). "
                f"{_UNHARMED}; raise the limit."
            )
        return f"{path} cannot be used: {error.strerror}. Give --store a folder that can be."
    code = getattr(error, "sqlite_errorname", "")  # such as SQLITE_IOERR_WRITE
    match code.removeprefix("SQLITE_").partition("_")[0]:
        case "FULL":
            return f"The disk of {path} is full. {_UNHARMED}; make room."
        case "BUSY" | "LOCKED":
            return f"{path} is in use by another program, which has to end first. {_UNHARMED}."
        case "IOERR":
            return (
                f"{path} cannot be read or written ({error}). {_UNHARMED}. Is the disk's quota "
                "reached, or the limit of the size of files (ulimit -f)? If not, it may be broken."
            )
        case "READONLY" | "CANTOPEN" | "PERM":
            return (
                f"{path} cannot be written ({error}). {_UNHARMED}; let this user write to it and "
                "its folder, or use another folder."
            )
    return f"{path} is damaged ({error}). Put a copy of it back, or use another folder."


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Make all changes of a block, or none of them."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # SQLite may have ended it, as when the disk is full
            database.execute("ROLLBACK")
        raise


def open_database(
    path: Path, identity: Mapping[str, str] | None, *, has_files: bool
) -> sqlite3.Connection:
    """Open the index of a store, or make one where there is none.

    No other program can read or change it until it is closed, so nothing that is done with it later
    waits for anybody.

    Args:
        path: of the index.
        identity: see `DiskStore`.
        has_files: whether the store has files of KV, which an index that is new would not name.

    Raises:
        StoreError: if the index is empty but should not be, of a newer version, or of another
            model.
        sqlite3.Error: if it is damaged; `storage_errors` makes a sentence of it.
    """
    if not path.exists():  # so that nobody else can read it from its first byte on
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    database = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=_LOCKED_S
    )
    try:
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        _keep_others_out(database)
        if not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            # It is new, or its maker ended before the first transaction did.
            if has_files:
                raise StoreError(
                    f"{path} is empty, and there are files of KV that it should name. Put a copy "
                    "of it back, or remove the folder."
                )
            _create_tables(database, identity or {})
        _check_whole(database, path)
        _check_meta(dict(database.execute("SELECT key, value FROM meta")), path.parent, identity)
    except BaseException:
        database.close()
        raise
    return database


def _keep_others_out(database: sqlite3.Connection) -> None:
    """Wait until no other program uses the database, and let none use it from then on."""
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("BEGIN EXCLUSIVE")
    database.execute("COMMIT")  # the mode keeps the lock
    database.execute("PRAGMA busy_timeout = 0")


def _create_tables(database: sqlite3.Connection, identity: Mapping[str, str]) -> None:
    meta = {"version": str(_VERSION), "identity": json.dumps(dict(identity))}
    with transaction(database):
        for statement in filter(str.strip, _SCHEMA.split(";")):
            database.execute(statement)
        database.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())


def _check_whole(database: sqlite3.Connection, path: Path) -> None:
    """Raise `sqlite3.DatabaseError` if a page is damaged, or the file has lost its end."""
    (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    ((num_pages,), (page_bytes,)) = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
    )
    if verdict == "ok" and path.stat().st_size != num_pages * page_bytes:
        verdict = "a part of it is missing"
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)


def _check_meta(meta: Mapping[str, str], folder: Path, identity: Mapping[str, str] | None) -> None:
    """Refuse an index of a newer version, or of another model; None for `identity` is any model."""
    try:
        version, stored = int(meta["version"]), dict(json.loads(meta["identity"]))
    except (KeyError, ValueError, TypeError):
        raise sqlite3.DatabaseError("it does not say what it is") from None
    if version > _VERSION:
        raise StoreError(
            f"{folder} was written by a newer version of TokenDance (format {version}, and this "
            f"one reads up to {_VERSION}). Use that version, or another folder."
        )
    if identity is None:
        return
    different = sorted(
        name for name in {*stored, *identity} if stored.get(name) != identity.get(name)
    )
    if different == ["private"]:
        raise StoreError(
            f"{folder} was written {'with' if 'private' in stored else 'without'} --private "
            "isolated, and what agents have read there is in their KV. Use the same, or give "
            "--store another folder."
        )
    if different:
        raise StoreError(
            f"{folder} holds KV of another model: {', '.join(different)} differ "
            f"({stored.get('shape')}, {stored.get('dtype')} there). Give --store another folder."
        )
