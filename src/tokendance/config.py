"""What options have in common: sizes in bytes, ranges, and files that have to be writable."""

import contextlib
import os
import re
from pathlib import Path

from tokendance.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: int | str) -> int:
    """Read a size such as 1000000, "512MiB" or "2 GB".

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(value).lower())
    if match is None:
        raise ConfigError(f"{value!r} is not a size in bytes. Write it like 512MiB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: float) -> str:
    """Write a size in the largest binary unit that keeps it at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def check_writable(path: Path, option: str) -> None:
    """Find out that a file can be written before the work, not after it.

    Raises:
        ConfigError: naming the command line's option that gave the path.
    """
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Give {option} another path."
        ) from error


def check_range(options: object, least: float, *names: str, most: float | None = None) -> None:
    """Check numbers among an object's attributes; None, which leaves a choice open, always fits.

    Args:
        options: whose.
        least: each may be.
        names: of the attributes.
        most: likewise; without bound if None.

    Raises:
        ConfigError: naming the first that is out of range, or is no number.
    """
    for name in names:
        value = getattr(options, name)
        if value is None or (value >= least and (most is None or value <= most)):
            continue
        allowed = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
        raise ConfigError(f"{name} is {value}. Give {allowed}.")


def default_kv_budget(device: str = "cpu") -> int:
    """A quarter of the memory that this process may use; on another device half of what is free.

    Pages that are not written take none of the machine's memory.
    """
    if device != "cpu":
        import torch

        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free) // 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    return memory // 4
