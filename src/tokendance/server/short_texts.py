"""Short texts, as far as they are known, and how long they are at most."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Characters of a text that are worth to be known.
MOST_TEXT = 1024
_MOST_PATTERN = 10**6
# Parts of a regular expression: an escape, a class, a group's beginning, a repetition, all else.
_PARTS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?::|P?<\w+>))?|\{(?P<least>\d+)(?:,\d*)?\}|.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Short:
    """A short text that something allows.

    Attributes:
        text: as far as it is known.
        cost: bytes of all of it, at most.
        is_whole: whether all of it is known.
    """

    text: str
    cost: int
    is_whole: bool = True

    @property
    def order(self) -> tuple[int, bool, str]:
        """By which the shortest come first, and those that are known before others."""
        return self.cost, not self.is_whole, self.text

    @staticmethod
    def of(text: str) -> "Short":
        """A text that is known."""
        return Short(text, len(text.encode()))


def join(parts: Iterable[Short | str]) -> Short:
    """Texts in a row; what follows one that is not known is not known, either."""
    text: list[str] = []
    cost, is_whole = 0, True
    for part in parts:
        one = Short.of(part) if isinstance(part, str) else part
        cost += one.cost
        if is_whole:
            text.append(one.text)
            is_whole = one.is_whole
    joined = "".join(text)
    if len(joined) > MOST_TEXT:
        return Short(joined[:MOST_TEXT], cost, is_whole=False)
    return Short(joined, cost, is_whole)


def pattern_cost(pattern: str) -> int:
    """Bytes that are enough to end a text that matches, wherever in the pattern it stands.

    Each part counts as often as it has to come at least, and all alternatives of a part do.
    """
    may_be_long = not pattern.isascii() or any(one in pattern for one in ("\\u", "\\x", "\\p"))
    unit = 6 if may_be_long else 2  # of a character, as JSON may have it
    totals, last = [0], 0  # of the groups that are open, and of the last part
    for match in _PARTS.finditer(pattern):
        part = match[0]
        if part[0] == "(":
            totals.append(0)
            continue
        if part == ")":
            last = totals.pop() if len(totals) > 1 else 0
        elif match["least"]:
            last *= int(match["least"][:6]) - 1
        else:
            last = 0 if part in "^$|*+?" else unit
        totals[-1] = min(totals[-1] + max(0, last), _MOST_PATTERN)
    return sum(totals) + 2
