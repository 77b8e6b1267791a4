"""The disk tier: whatever happens, what was reported is there, and what is there is right."""

import itertools
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.cli import app as command_line
from tokendance.disk.kv_file import WrittenFile, checksum_of
from tokendance.disk.records import CacheRecord, FileId, SessionKey
from tokendance.disk.schema import storage_errors
from tokendance.disk.store import DiskStore
from tokendance.errors import CorruptFileError, InputError, StoreError
from tokendance.store.kv_rows import KVRows

IDENTITY = {"weights": "abc", "dtype": "float32", "shape": "2 layers"}
TOWN = SessionKey("", "town")


def rows_of(seed: int, count: int = 20) -> KVRows:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 2, 3, count, 4)).astype(np.float32)
    return KVRows(np.arange(count, dtype=np.int32), keys, values)


def is_same(one: KVRows, other: KVRows) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("positions", "keys", "values")
    )


def cache_of(files: list[tuple[FileId, int]]) -> CacheRecord:
    extents = np.array([(file, 0, count) for file, count in files], np.int64).reshape(-1, 3)
    total = sum(count for _, count in files)
    return CacheRecord(np.arange(total, dtype=np.int32), total, total, extents)


def save(store: DiskStore, key: SessionKey, number: int, seeds: dict[str, list[int]]) -> None:
    """Write a session whose agents have a file for each seed; equal seeds share one."""
    files: dict[FileId, WrittenFile] = {}
    by_seed: dict[int, FileId] = {}
    for seed in sorted({seed for own in seeds.values() for seed in own}):
        file, written = store.write(rows_of(seed))
        files[file] = written
        by_seed[seed] = file
    caches = {agent: cache_of([(by_seed[one], 20) for one in own]) for agent, own in seeds.items()}
    store.commit(key, round_number=number, state=b"%d" % number, caches=caches, files=files)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore(tmp_path / "store", IDENTITY) as found:
        yield found


def test_what_is_written_is_read(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1, 2], "bob": [1, 3]})
    found = store.session(TOWN)
    assert found is not None
    assert (found.round, found.state, list(found.caches)) == (1, b"1", ["ann", "bob"])
    for agent, seeds in {"ann": [1, 2], "bob": [1, 3]}.items():
        extents = found.caches[agent].extents
        for (file, _, _), seed in zip(extents.tolist(), seeds, strict=True):
            assert is_same(store.read(store.index.file(FileId(file))), rows_of(seed))
    usage = store.index.usage(TOWN)
    assert (usage.files, usage.stored_rows, usage.dense_rows) == (3, 60, 80)
    assert sorted(names for _, names in store.index.readers(TOWN).values()) == [
        ["ann"], ["ann", "bob"], ["bob"],
    ]  # fmt: skip
    store.check_integrity()


def test_a_byte_per_number_is_near(tmp_path: Path) -> None:
    sizes = []
    for compressed in (False, True):
        with DiskStore(tmp_path / str(compressed), IDENTITY, compressed=compressed) as store:
            rows = rows_of(1, 200)
            file, written = store.write(rows)
            store.commit(
                TOWN, round_number=1, state=b"", caches={"a": cache_of([(file, 200)])},
                files={file: written},
            )  # fmt: skip
            found = store.read(store.index.file(file))
            sizes.append(written.num_bytes)
            assert np.array_equal(found.positions, rows.positions)
            limit = 0.02 if compressed else 0.0
            assert np.abs(found.keys - rows.keys).max() <= limit * np.abs(rows.keys).max()
            assert np.abs(found.values - rows.values).max() <= limit * np.abs(rows.values).max()
            assert store.verify() == []
    assert sizes[1] < 0.6 * sizes[0]
    # What no scale can hold is written as it is.
    with DiskStore(tmp_path / "x", IDENTITY, compressed=True) as store:
        rows = rows_of(1)
        rows.keys[0, 0, 0, 0] = np.inf
        assert is_same(store.read(store.write(rows)[1]), rows)


def test_only_the_owner_may_read(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1]})
    for path in [store.folder, *store.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_files_that_nobody_refers_to_are_removed(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1], "bob": [1, 2]})
    save(store, TOWN, 2, {"ann": [3]})
    assert store.index.usage(TOWN).files == 1
    store.check_integrity()
    assert store.remove(TOWN)
    assert not store.remove(TOWN)
    assert store.num_bytes == 0
    store.check_integrity()


def test_a_second_process_is_refused(store: DiskStore) -> None:
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        DiskStore(store.folder, IDENTITY)


def test_another_model_or_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    DiskStore(folder, IDENTITY).close()
    with pytest.raises(StoreError, match="another model: weights differ"):
        DiskStore(folder, {**IDENTITY, "weights": "def"})
    DiskStore(folder, None).close()  # only to look
    with sqlite3.connect(folder / "index.sqlite") as index:
        index.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    index.close()
    with pytest.raises(StoreError, match="newer version"):
        DiskStore(folder, IDENTITY)


def test_folders_that_are_no_store_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other things"):
        DiskStore(tmp_path, IDENTITY)
    with pytest.raises(StoreError, match="no store"):
        DiskStore(tmp_path / "nothing", None)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        DiskStore(tmp_path / "file", IDENTITY)
    assert (tmp_path / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["", "a\0b", "x" * 4000, "line\nbreak", "\ud800", "../" * 100, "\u202e"]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError):
        SessionKey("", name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "..", "C:\\x", "' OR 1=1 --", "käse 🧀"])
def test_names_never_become_paths(store: DiskStore, name: str) -> None:
    before = set(store.folder.parent.rglob("*"))
    save(store, SessionKey("", name), 1, {"../../agent": [1]})
    new = set(store.folder.parent.rglob("*")) - before
    assert {path.parent for path in new} <= {store.folder, store.folder / "kv"}
    assert store.index.session_keys() == [SessionKey("", name)]


def test_a_flipped_byte_is_found_and_named(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1, 2], "bob": [1, 3]})
    rng = random.Random(0)
    paths = sorted((store.folder / "kv").iterdir())
    for path in paths:
        whole = path.read_bytes()
        for place in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
            )
            (problem,) = store.verify()
            assert path.name in problem.text
        path.write_bytes(whole[: len(whole) // 2])
        assert len(store.verify()) == 1
        path.write_bytes(whole)
    assert store.verify() == []
    # Only what it touches is gone.
    session = store.session(TOWN)
    assert session is not None
    store.forget_file(FileId(int(session.caches["bob"].extents[1, 0])))
    session = store.session(TOWN)
    assert session is not None
    assert [len(cache.token_ids) for cache in session.caches.values()] == [40, 20]
    store.check_integrity()


def test_a_flipped_byte_in_the_index_is_found_or_harmless(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with DiskStore(folder, IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1, 2], "bob": [1, 3]})
        expected = store.session(TOWN)
    assert expected is not None
    index = folder / "index.sqlite"
    whole = index.read_bytes()
    files = {path.name: path.read_bytes() for path in (folder / "kv").iterdir()}
    rng = random.Random(3)
    num_found = 0
    for _ in range(300):
        place = rng.randrange(len(whole))
        changed = bytes([whole[place] ^ (1 << rng.randrange(8))])
        index.write_bytes(whole[:place] + changed + whole[place + 1 :])
        try:
            with DiskStore(folder, IDENTITY) as store:
                if not store.verify():
                    found = store.session(TOWN)
                    assert found is not None
                    assert (found.round, found.state) == (expected.round, expected.state)
                    for agent, cache in found.caches.items():
                        assert np.array_equal(cache.token_ids, expected.caches[agent].token_ids)
                        assert np.array_equal(cache.extents, expected.caches[agent].extents)
                else:
                    num_found += 1
        except StoreError:
            num_found += 1
        for name, content in files.items():
            (folder / "kv" / name).write_bytes(content)
    assert num_found > 5  # most of a small index is empty space


def test_a_damaged_session_can_be_removed_and_is_in_nobodys_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    with DiskStore(folder, IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1, 2]})
        save(store, SessionKey("", "city"), 1, {"bob": [3]})
    with sqlite3.connect(folder / "index.sqlite") as index:
        index.execute("UPDATE sessions SET state = x'00' WHERE name = 'town'")
    index.close()

    def ask(*words: str) -> str:
        command_line(["store", *words, "--store", str(folder)])
        return capsys.readouterr().out

    listed = ask("ls")
    assert re.search(r"town +damaged +\n", listed)
    assert re.search(r"city +1 +1 ", listed)
    with pytest.raises(StoreError, match="tokendance store rm"):
        ask("show", "town")
    assert "freed" in ask("rm", "town")
    with DiskStore(folder, IDENTITY) as store:
        assert store.index.session_keys() == [SessionKey("", "city")]
        assert store.verify() == []


def test_files_in_each_others_place_are_found(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1, 2]})
    one, other = sorted((store.folder / "kv").iterdir())
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert len(store.verify()) == 2


def test_an_index_that_is_cut_off_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with DiskStore(folder, IDENTITY) as store:
        for number in range(20):
            save(store, SessionKey("", f"town {number}"), 1, {"ann": [number]})
    index = folder / "index.sqlite"
    whole = index.read_bytes()
    files = sorted((folder / "kv").iterdir())
    for length in (0, 50, 100, 4096, 8192, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        index.write_bytes(whole[:length])
        with pytest.raises(StoreError):
            DiskStore(folder, IDENTITY)
    index.unlink()
    with pytest.raises(StoreError):
        DiskStore(folder, IDENTITY)
    assert sorted((folder / "kv").iterdir()) == files
    index.write_bytes(whole)
    with DiskStore(folder, IDENTITY) as store:
        assert len(store.index.session_keys()) == 20
        store.check_integrity()


def test_a_full_disk_harms_nothing(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, TOWN, 1, {"ann": [1]})
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.write(rows_of(2))
    monkeypatch.setattr(os, "fsync", real)
    store.check_integrity()
    # The index, too.
    (pages,) = store.index._database.execute("PRAGMA page_count").fetchone()
    store.index._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        store.commit(
            SessionKey("", "long"), round_number=1, state=bytes(100_000), caches={}, files={}
        )
    store.index._database.execute("PRAGMA max_page_count = 100000")
    assert store.index.session_keys() == [TOWN]
    save(store, TOWN, 2, {"ann": [1, 2]})
    store.check_integrity()


def grow(store: DiskStore, seeds: list[int]) -> None:
    """Store sessions until that cannot be done any more; the index grows with each."""
    for number in range(500):
        save(store, SessionKey("", f"{seeds} {number}"), 2, {"ann": seeds})


def test_a_limit_of_the_size_of_files_harms_nothing(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1]})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest, seeds in ((1_000, [2]), (60_000, [])):  # of files of KV, and of the index
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        try:
            with pytest.raises(StoreError, match=r"ulimit -f") as told:
                grow(store, seeds)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "unharmed" in str(told.value)
        store.check_integrity()
        assert store.verify() == []
    save(store, TOWN, 2, {"ann": [1, 2]})
    stored = store.session(TOWN)
    assert stored is not None
    assert stored.round == 2


def test_a_disk_that_is_full_harms_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("needs a right to mount")
    try:
        with DiskStore(disk / "s", IDENTITY) as store:
            save(store, TOWN, 1, {"ann": [1]})
            for seeds in ([2], []):  # files of KV, then the index
                with pytest.raises(StoreError, match=r"disk of .* is full"):
                    grow(store, seeds)
                store.check_integrity()
                assert store.verify() == []
            for key in store.index.session_keys():
                if key != TOWN:
                    assert store.remove(key)
            save(store, TOWN, 2, {"ann": [1, 2]})
        with DiskStore(disk / "s", IDENTITY) as store:
            assert store.verify() == []
            assert store.index.session_keys() == [TOWN]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def told_as_a_user(folder: Path, identity: dict[str, str] | None) -> str:
    """What opening a store says to a user who may only read it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            DiskStore(folder, identity)
        except StoreError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, encoding="utf-8") as pipe:
        return pipe.read()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as temporary:  # which others may look into
        folder = Path(temporary) / "s"
        Path(temporary).chmod(0o555)
        assert "Permission denied" in told_as_a_user(folder, IDENTITY)
        Path(temporary).chmod(0o755)
        with DiskStore(folder, IDENTITY) as store:
            save(store, TOWN, 1, {"ann": [1]})
        before = tree(folder)
        for part in ("", "kv", "lock", "index.sqlite"):
            for path in (folder, *folder.iterdir()):
                path.chmod(0o777)
            (folder / part).chmod(0o555)
            for identity in (IDENTITY, None):
                said = told_as_a_user(folder, identity)
                assert f"{folder / part} may not be written by this user" in said
        folder.chmod(0o777)
        assert tree(folder) == before


def hold_index(folder: Path) -> subprocess.Popen[str]:
    """Another program that holds the index until its input ends; it says whether it got it."""
    code = (
        "import sqlite3, sys\n"
        "index = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "try:\n"
        "    index.execute('BEGIN EXCLUSIVE')\n"
        "    print('held', flush=True)\n"
        "except sqlite3.OperationalError as error:\n"
        "    print(error, flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(folder / "index.sqlite")]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_no_other_program_can_hold_the_index_of_an_open_store(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1]})
    # Who is refused in this process takes no lock away.
    with pytest.raises(StoreError, match="in use"):
        DiskStore(store.folder, IDENTITY)
    with hold_index(store.folder) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "database is locked\n"
        save(store, TOWN, 2, {"ann": [1, 2]})
        other.communicate()
    assert store.index.session_keys() == [TOWN]
    (timeout,) = store.index._database.execute("PRAGMA busy_timeout").fetchone()
    assert timeout == 0  # and if one could, nobody would wait for it


def test_a_store_whose_index_is_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendance.disk.schema._LOCKED_S", 0.01)
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1]})
    with hold_index(tmp_path / "s") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="in use by another program"):
            DiskStore(tmp_path / "s", IDENTITY)
        other.communicate()
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        assert store.session(TOWN) is not None


def test_a_clock_that_is_set_back_makes_nothing_old(tmp_path: Path) -> None:
    now = 1e9
    size = len(rows_of(0).keys.tobytes()) * 2 + 1200
    with DiskStore(tmp_path / "s", IDENTITY, budget=3 * size, clock=lambda: now) as store:
        for name, time_s in (("first", 1e9), ("second", 500.0), ("third", 600.0)):
            now = time_s
            file, written = store.write(rows_of(1))
            store.commit(
                SessionKey("", name), round_number=1, state=b"", files={file: written},
                caches={"ann": cache_of([(file, 20)])}, ttl_s=60.0,
            )  # fmt: skip
        now = 1e9 + 50
        assert store.remove_expired() == []
        assert [key.name for key in store.index.keys_with_kv()] == ["first", "second", "third"]


def test_files_that_are_named_outlast_an_interrupt(store: DiskStore) -> None:
    file, written = store.write(rows_of(1))
    store.commit(
        TOWN, round_number=1, state=b"", caches={"ann": cache_of([(file, 20)])},
        files={file: written},
    )  # fmt: skip
    other, unnamed = store.write(rows_of(2))
    # Whoever is interrupted after the commit does this.
    store.discard_unnamed({file: written, other: unnamed})
    store.check_integrity()
    assert store.verify() == []


# -- what is not the store's own ------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str | bytes]:
    """All that is under a folder: contents of files, and where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def link_lock(folder: Path, mine: Path) -> None:
    (folder / "lock").symlink_to(mine / "letter")


def link_hard(folder: Path, mine: Path) -> None:
    (mine / "empty").touch()
    (folder / "lock").hardlink_to(mine / "empty")


def link_nowhere(folder: Path, mine: Path) -> None:
    (folder / "lock").symlink_to(mine / "new")


def write_lock(folder: Path, _: Path) -> None:
    (folder / "lock").write_text("do not touch")


def make_pipe(folder: Path, _: Path) -> None:
    os.mkfifo(folder / "lock")


def link_kv(folder: Path, mine: Path) -> None:
    (folder / "kv").symlink_to(mine)


def fill_kv(folder: Path, _: Path) -> None:
    (folder / "kv").mkdir()
    (folder / "kv" / "letter").write_text("mine")


def link_index(folder: Path, mine: Path) -> None:
    (folder / "index.sqlite").symlink_to(mine / "new")


def link_journal(folder: Path, mine: Path) -> None:
    (folder / "index.sqlite").touch()
    (folder / "index.sqlite-journal").symlink_to(mine / "letter")


def other_index(folder: Path, mine: Path) -> None:
    with sqlite3.connect(folder / "index.sqlite") as index:
        index.execute("CREATE TABLE letters (text)")
    index.close()
    fill_kv(folder, mine)


def empty_index(folder: Path, _: Path) -> None:
    (folder / "index.sqlite").touch()
    (folder / "letter").write_text("mine")


@pytest.mark.parametrize(
    "prepare",
    [
        link_lock, link_hard, link_nowhere, write_lock, make_pipe, link_kv, fill_kv, link_index,
        link_journal, other_index, empty_index,
    ],
)  # fmt: skip
def test_nothing_that_is_not_the_stores_own_is_touched(
    tmp_path: Path, prepare: Callable[[Path, Path], None]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("mine")
    (mine / f"{'0' * 32}.safetensors").write_text("mine, too")
    (tmp_path / "s").mkdir()
    prepare(tmp_path / "s", mine)
    before = tree(tmp_path)
    for identity in (IDENTITY, None):
        with pytest.raises(StoreError, match="--store"):
            DiskStore(tmp_path / "s", identity)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("prepare", [link_lock, link_kv])
def test_what_was_put_into_a_store_is_left_alone(
    tmp_path: Path, prepare: Callable[[Path, Path], None]
) -> None:
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1]})
        (file,) = store.index.file_ids()
        name = store.index.file(file).name
    # Files of others stay, also in its own folders, and it opens.
    for place in (tmp_path / "s", tmp_path / "s" / "kv"):
        (place / "letter").write_text("mine")
        (place / f"{'0' * 32}.txt").write_text("mine")
    before = tree(tmp_path)
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        assert store.num_leftovers == 0
        assert store.verify() == []
    assert tree(tmp_path) == before
    # Nor is a link followed that stands in a file's place, though it leads to the right bytes.
    path = tmp_path / "s" / "kv" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        (problem,) = store.verify()
        assert problem.file is not None
        store.forget_file(problem.file)
        assert not path.is_symlink()
    assert (tmp_path / "elsewhere").exists()
    # Nor one in the place of what it is made of.
    shutil.move(tmp_path / "s" / "kv", tmp_path / "mine")
    (tmp_path / "mine" / "letter").write_text("mine")
    (tmp_path / "s" / "lock").unlink()
    prepare(tmp_path / "s", tmp_path / "mine")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match="link"):
        DiskStore(tmp_path / "s", IDENTITY)
    assert tree(tmp_path) == before


def test_an_index_that_names_files_elsewhere_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1]})
    with sqlite3.connect(tmp_path / "s" / "index.sqlite") as index:
        index.execute("UPDATE files SET name = '../../letter'")
    index.close()
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        (problem,) = store.verify()
        assert "not named as such files are" in problem.text
        store.remove(TOWN)
    assert (tmp_path / "letter").read_text() == "mine"


def test_what_sqlite_takes_back_by_itself_is_told_as_it_is(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1]})

    def fail() -> None:
        with storage_errors(store.index.path), store.index._changing():
            store.index._database.execute("ROLLBACK")  # as it does when the disk is full
            raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(StoreError, match="full"):
        fail()
    save(store, TOWN, 2, {"ann": [1, 2]})
    store.check_integrity()


def test_a_budget_is_kept(tmp_path: Path) -> None:
    now = 1000.0
    size = len(rows_of(0).keys.tobytes()) * 2 + 1200
    with DiskStore(tmp_path / "s", IDENTITY, budget=3 * size, clock=lambda: now) as store:
        for number in range(3):
            now += 1
            assert store.make_room(size - 500, SessionKey("", str(number)))
            save(store, SessionKey("", str(number)), 1, {"ann": [number]})
        now += 1
        assert store.make_room(size, SessionKey("", "3"))
        store.check_integrity()
        # Who was used longest ago has lost its KV, and none of what it says.
        kept = [store.session(SessionKey("", str(number))) for number in range(3)]
        assert [len(one.caches) for one in kept if one] == [0, 1, 1]
        assert [one.state for one in kept if one] == [b"1", b"1", b"1"]
        assert not store.make_room(10 * size, SessionKey("", "2"))
        assert store.index.usage(SessionKey("", "2")).files == 1  # whom it was for keeps its own


def test_sessions_past_their_time_are_removed(tmp_path: Path) -> None:
    now = 1000.0
    with DiskStore(tmp_path / "s", IDENTITY, clock=lambda: now) as store:
        for name, ttl_s in (("short", 10.0), ("long", 100.0), ("ever", None)):
            store.commit(
                SessionKey("", name), round_number=1, state=b"", caches={}, files={}, ttl_s=ttl_s
            )
        now += 50
        assert store.remove_expired() == [SessionKey("", "short")]
        assert {key.name for key in store.index.session_keys()} == {"long", "ever"}


def test_leftovers_are_removed(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        save(store, TOWN, 1, {"ann": [1]})
        store.write(rows_of(2))  # never named
        (store.folder / "kv" / f"{'0' * 32}.safetensors.tmp").write_bytes(b"half")
    with DiskStore(tmp_path / "s", IDENTITY) as store:
        assert store.num_leftovers == 2
        store.check_integrity()


def write_until_killed(
    folder: Path, report: int, num_rounds: int, moment: float, open_s: float
) -> None:
    """Write rounds of two sessions, and report each when it is durable; runs until it is killed.

    Args:
        folder: of the store.
        report: file to write to.
        num_rounds: that are sure to be written before.
        moment: how long after them it is killed, in times of what a round takes here. Without any
            rounds, it is killed so long after it begins, in times of `open_s`.
        open_s: seconds that opening the store takes.
    """

    def be_killed(typical_s: float) -> None:
        # Nobody handles this signal, so that it ends the process wherever that is.
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, moment * typical_s))

    if num_rounds == 0:
        be_killed(open_s)
    with DiskStore(folder, IDENTITY) as store:
        numbers = [
            session.round if (session := store.session(SessionKey("", name))) else 0
            for name in "ab"
        ]
        for num_written in itertools.count(1):
            begun_s = time.perf_counter()
            index = numbers.index(min(numbers))
            numbers[index] += 1
            number, name = numbers[index], "ab"[index]
            save(store, SessionKey("", name), number, {"ann": [number], "bob": [number, 7]})
            os.write(report, b"%s %d\n" % (name.encode(), number))
            if num_written == num_rounds:
                be_killed(time.perf_counter() - begun_s)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_moment_it_holds_what_it_reported(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    rng = random.Random(1)
    reported = {"a": 0, "b": 0}
    open_s = 0.01
    for _ in range(examples(100)):
        reading, writing = os.pipe()
        num_rounds, moment = rng.randrange(5), rng.uniform(0, 2)
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(folder, writing, num_rounds, moment, open_s)
            finally:
                os._exit(1)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGALRM
        with open(reading, "rb") as pipe:
            for line in pipe.read().split(b"\n"):
                if line:
                    name, number = line.decode().split()
                    reported[name] = int(number)
        begun_s = time.perf_counter()
        with DiskStore(folder, IDENTITY) as store:
            open_s = time.perf_counter() - begun_s
            store.check_integrity()
            assert store.verify() == []
            for name, last in reported.items():
                session = store.session(SessionKey("", name))
                found = session.round if session else 0
                assert found in (last, last + 1)
                reported[name] = found
                if session is None:
                    continue
                assert session.state == b"%d" % found
                file = FileId(int(session.caches["ann"].extents[0, 0]))
                assert is_same(store.read(store.index.file(file)), rows_of(found))
    assert min(reported.values()) > 10  # it did get to write


@settings(max_examples=examples(60))
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=25))
def test_any_order_of_changes_keeps_the_books(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("store") / "s"
    store = DiskStore(folder, IDENTITY, budget=40_000)
    expected: dict[str, int] = {}
    try:
        for number, (action, which) in enumerate(steps, 1):
            key = SessionKey("", f"town {which}")
            if action <= 1 and store.make_room(8_000, key):
                save(store, key, number, {"ann": [number], "bob": [number, 7]})
                expected[key.name] = number
            elif action == 2:
                assert store.remove(key) == (expected.pop(key.name, None) is not None)
            elif action == 3:
                store.drop_kv(key)
            elif action == 4:
                store.close()
                store = DiskStore(folder, IDENTITY, budget=40_000)
            elif action == 5 and (files := sorted(store.index.file_ids())):
                store.forget_file(files[which % len(files)])
            store.check_integrity()
            found = {key.name: store.session(key) for key in store.index.session_keys()}
            assert {name: one.round for name, one in found.items() if one} == expected
    finally:
        store.close()


def test_a_file_of_something_else_is_refused(store: DiskStore) -> None:
    save(store, TOWN, 1, {"ann": [1]})
    (file,) = store.index.file_ids()
    written = store.index.file(file)
    path = store.folder / "kv" / written.name
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        path.write_bytes(content)
        other = WrittenFile(written.name, 20, len(content), checksum_of(content))
        with pytest.raises(CorruptFileError):
            store.read(other)
