"""Sizes in bytes, as people write them."""

import re
import reprlib

from tokendance.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: int | str, name: str = "The size") -> int:
    """Read a size such as 1000000, "512MiB" or "2 GB".

    Args:
        value: the size.
        name: of what it is the size, for the message.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmg]i?)?b?\s*", str(value).lower())
    if match is None:
        raise ConfigError(
            f"{name} is {reprlib.repr(value)}, and no size in bytes. Write it like 512MiB or 2GiB."
        )
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: float) -> str:
    """Write a size in the largest binary unit that keeps it at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
