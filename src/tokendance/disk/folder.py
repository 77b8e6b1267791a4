"""The folder of a store: what in it is the store's own, and the lock of the process that has it.

    folder/
      lock            the number of the process that has the store open, or had it last
      index.sqlite    with a journal beside it while it is changed
      kv/             files of KV, named at random

A user may name a folder by mistake, and another program may have put files or links into one. So
everything that has one of these names is looked at before anything is changed. Links are followed
nowhere but in the path of the folder itself; what is not the store's own is never opened for
writing, and never removed.
"""

import contextlib
import os
import re
import sqlite3
import stat
from pathlib import Path

from tokendance.disk.kv_file import is_kv_name
from tokendance.errors import StoreError

LOCK, INDEX, KV = "lock", "index.sqlite", "kv"
_JOURNALS = tuple(f"{INDEX}-{suffix}" for suffix in ("journal", "wal", "shm"))
_PROCESS_ID = re.compile(rb"\d{0,20}\s*")


def check_folder(folder: Path, *, may_make: bool) -> None:
    """Make sure that a folder is a store, or may become one. Changes nothing.

    Args:
        folder: which need not exist.
        may_make: whether a store may be made where there is none.

    Raises:
        StoreError: if it is neither; if something else has the name of a part of the store.
        OSError: if it cannot be read.
    """
    for name in (LOCK, INDEX, *_JOURNALS):
        _check_kind(folder / name, is_folder=False)
    _check_kind(folder / KV, is_folder=True)
    for path in (folder, folder / LOCK, folder / INDEX, folder / KV):
        if path.exists() and not os.access(path, os.W_OK):
            raise StoreError(
                f"{path} may not be written by this user. Let it write there, or give --store "
                "another folder."
            )
    index = folder / INDEX
    if index.exists() and index.stat().st_size > 0:
        if _is_another_programs(index):
            raise _holds_other_things(folder)
        return
    if not may_make and not index.exists():
        raise StoreError(f"There is no store in {folder}. Give --store its folder.")
    # There is no store yet, or its maker ended before the index had its tables.
    own = {LOCK, KV, *((INDEX, *_JOURNALS) if index.exists() else ())}
    if folder.exists() and not own.issuperset(os.listdir(folder)):
        raise _holds_other_things(folder)
    if (folder / KV).exists() and not all(map(is_kv_name, os.listdir(folder / KV))):
        raise _holds_other_things(folder)


def take_lock(path: Path) -> int:
    """Hold a lock file for this process alone, and write the process's number into it.

    Returns:
        A handle, which holds the lock until it is closed.

    Raises:
        StoreError: if another process holds it, or the file is not a store's.
        OSError: if it cannot be written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        content = os.read(handle, 64)
        if not _PROCESS_ID.fullmatch(content):
            raise StoreError(
                f"{path} is a file of something else, and no store's. Give --store another folder."
            )
        _hold(handle, path, content.decode().strip())
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _hold(handle: int, path: Path, process: str) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: SQLite's own keep the index whole
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(
            f"{path.parent} is in use by process {process or 'unknown'}. Two cannot write to one "
            "store: stop the other, or give --store another folder."
        ) from None


def _check_kind(path: Path, *, is_folder: bool) -> None:
    """Refuse what is a link, also a hard one, or something else than a file or a folder."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return
    if is_folder:
        fits = stat.S_ISDIR(state.st_mode)
    else:
        fits = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
    if not fits:
        raise StoreError(
            f"{path} is a link, or no {'folder' if is_folder else 'file'}, and was not made by "
            "TokenDance. Take it away, or give --store another folder."
        )


def _is_another_programs(index: Path) -> bool:
    """Whether an SQLite file has tables, and none of a store's. One that is damaged may be ours."""
    if index.with_name(_JOURNALS[0]).exists():  # so what the file says need not be true
        return False
    # By SQLite, and with its locks: closing the file in any other way would let go of those by
    # which a store that is open in this process keeps others out.
    address = f"{index.absolute().as_uri()}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(address, uri=True, timeout=0)) as database,
    ):
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
        return bool(names) and "meta" not in names
    return False


def _holds_other_things(folder: Path) -> StoreError:
    return StoreError(
        f"{folder} holds other things and is no store. Give --store a folder that is empty or does "
        "not exist."
    )
