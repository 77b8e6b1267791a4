"""`tokendance store`: what is kept on disk, whether it is whole, and how to be rid of it."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.disk.records import FileId, SessionKey
from tokendance.disk.store import DiskStore
from tokendance.errors import CorruptFileError, StoreError
from tokendance.units import format_bytes


def list_sessions(folder: Path, console: Console) -> None:
    """Print a table of all sessions: sizes stored against one dense cache for each agent."""
    with DiskStore(folder, None) as disk:
        numbers = ("agents", "rounds", "dense", "stored", "times", "files", "last used")
        table = _table("session", *numbers)
        row_bytes = disk.index.row_bytes
        for key in disk.index.session_keys():
            try:
                session, usage = disk.session(key), disk.index.usage(key)
            except CorruptFileError:
                table.add_row(escape(_title(key)), "[red]damaged[/red]")
                continue
            assert session is not None
            dense = usage.dense_rows * row_bytes
            table.add_row(
                escape(_title(key)),
                str(len(session.caches)),
                str(session.round),
                format_bytes(dense),
                format_bytes(usage.num_bytes),
                f"{dense / usage.num_bytes:.1f}" if usage.num_bytes else "-",
                str(usage.files),
                _ago(session.used_s),
            )
        console.print(table)
        console.print(
            f"{format_bytes(disk.num_bytes)} of KV in {escape(str(folder))}. dense: one full "
            "cache for each agent. A file that several sessions share counts for each."
        )


def show_session(folder: Path, name: str, console: Console) -> None:
    """Print who refers to what in a session."""
    with DiskStore(folder, None) as disk:
        key = _find(disk, name)
        session = disk.session(key)
        assert session is not None
        readers = disk.index.readers(key)
        console.print(
            f"[bold]{escape(_title(key))}[/bold]: {len(session.caches)} agents, "
            f"{session.round} rounds, last used {_ago(session.used_s)}"
            + (f", kept for {_span(session.ttl_s)} after that" if session.ttl_s else "")
        )
        agents = _table("agent", "tokens", "exact", "own", "shared")
        for agent, cache in session.caches.items():
            own = sum(
                int(count)
                for file, _, count in cache.extents
                if len(readers[FileId(int(file))][1]) == 1
            )
            agents.add_row(
                escape(agent),
                f"{len(cache.token_ids):,}",
                f"{cache.num_exact:,}",
                f"{own:,}",
                f"{len(cache.token_ids) - own:,}",
            )
        console.print(agents)
        files = _table("file", "tokens", "size")
        files.add_column("who refers to it")
        for file, (num_rows, names) in readers.items():
            files.add_row(
                disk.index.file(file).name[:8],
                f"{num_rows:,}",
                format_bytes(disk.index.file(file).num_bytes),
                escape(", ".join(names)),
            )
        console.print(files)


def verify_store(folder: Path, console: Console) -> None:
    """Read every file and compare it with its checksum.

    Raises:
        SystemExit: with code 1 if something is damaged.
    """
    with DiskStore(folder, None) as disk:
        with console.status("Reading every file ..."):
            problems = disk.verify()
        for problem in problems:
            readers = {
                f"{_title(key)}: {', '.join(of_session[problem.file][1])}"
                for key in disk.index.session_keys()
                if problem.file in (of_session := disk.index.readers(key))
            }
            whose = f" It belongs to {'; '.join(sorted(readers))}." if readers else ""
            console.print(f"[red]{escape(problem.text)}[/red]{escape(whose)}")
        if problems:
            sys.exit(1)
        console.print(f"All of {escape(str(folder))} is as it was written.")


def collect_garbage(folder: Path, budget: int | None, console: Console) -> None:
    """Remove sessions past their time, leftovers, damaged files, and what exceeds a budget."""
    with DiskStore(folder, None) as disk:
        before = disk.num_bytes
        expired = disk.remove_expired()
        problems = disk.verify()
        for problem in problems:
            if problem.file is not None:
                disk.forget_file(problem.file)
        if budget is not None:
            disk.budget = budget
            disk.make_room(0, None)
        console.print(
            f"{len(expired)} sessions past their time, {disk.num_leftovers} leftovers and "
            f"{sum(problem.file is not None for problem in problems)} damaged files removed: "
            f"{format_bytes(before - disk.num_bytes)} of KV freed, "
            f"{format_bytes(disk.num_bytes)} left."
        )


def remove_session(folder: Path, name: str, console: Console) -> None:
    """Remove a session with all that only it refers to."""
    with DiskStore(folder, None) as disk:
        key = _find(disk, name)
        before = disk.num_bytes
        disk.remove(key)
        console.print(
            f"{escape(_title(key))} is removed: {format_bytes(before - disk.num_bytes)} freed."
        )


def _find(disk: DiskStore, name: str) -> SessionKey:
    """The session of a title, which need not be whole; a StoreError if there is none."""
    keys = disk.index.session_keys()
    for key in keys:
        if _title(key) == name:
            return key
    titles = ", ".join(repr(_title(key)) for key in keys[:10]) or "none"
    raise StoreError(f"There is no session {name!r} in {disk.folder}. There are: {titles}.")


def _table(heading: str, *numbers: str) -> Table:
    """A table whose first column is text, and the others are numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column(heading, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _title(key: SessionKey) -> str:
    """A session's name; after a few digits of whose it is, where there are tenants."""
    return f"{key.tenant[:8]}/{key.name}" if key.tenant else key.name


def _ago(used_s: float) -> str:
    return f"{_span(max(0.0, time.time() - used_s))} ago"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
