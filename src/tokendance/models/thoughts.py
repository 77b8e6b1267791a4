"""Thoughts: what a model writes between two marks before it answers, as its chat template has them.

    BEFORE --begin mark--> INSIDE --end mark--> BETWEEN --no blank--> BEHIND

Some templates write the first mark themselves, as the last of a prompt; then an answer begins
inside. The parser goes by characters, so it makes no difference in what pieces a text comes.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

_WORDS = "think|thinking|thought|thoughts|reasoning"
_END_MARKS = re.compile(rf"</((?:\w+:)?(?:{_WORDS}))>|\[/({_WORDS})\]", re.IGNORECASE)


class Said(NamedTuple):
    """An answer, or more of one: what was thought, and what was said to whoever asked."""

    thought: str
    text: str


class Standing(Enum):
    """Where in an answer its last character stands; see the module."""

    BEFORE = auto()
    INSIDE = auto()
    BETWEEN = auto()
    BEHIND = auto()


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """What stands before and behind a model's thoughts."""

    begin: str
    end: str

    @staticmethod
    def found_in(template: str) -> "ThoughtMarks | None":
        """The marks that a chat template knows; None if it knows none."""
        match = _END_MARKS.search(template)
        if match is None:
            return None
        end = match[0]
        return ThoughtMarks(end.replace("/", "", 1), end)

    def standing_behind(self, text: str) -> Standing:
        """Where an answer stands that has begun with a text, and now goes on."""
        if self.end in text:
            return Standing.BEHIND
        begun = text.lstrip()
        if not begun:
            return Standing.BEFORE
        return Standing.INSIDE if begun.startswith(self.begin) else Standing.BEHIND

    def join(self, said: Said) -> str:
        """One text of thoughts and what was said."""
        return f"{self.begin}\n{said.thought}\n{self.end}\n\n{said.text}"

    def split(self, text: str) -> Said:
        """Split what an assistant has said earlier; the first mark may be missing."""
        is_open = self.end in text and not text.lstrip().startswith(self.begin)
        parser = ThoughtParser(self, Standing.INSIDE if is_open else Standing.BEFORE)
        return parser.whole(text)


class ThoughtParser:
    """Divides one answer into thoughts and what is said.

    Blanks at the edges of thoughts, and those before what is said, belong to nobody.

    Attributes:
        standing: of the last character.
        has_thoughts: whether they have begun, by a mark or before the answer.
        held: what may be the beginning of a mark; before thoughts with blanks before it.
    """

    def __init__(self, marks: ThoughtMarks, standing: Standing = Standing.BEFORE) -> None:
        """Begin an answer, or go on with one that stands somewhere."""
        self.standing = standing
        self.has_thoughts = standing is Standing.INSIDE
        self._marks = marks
        self.held = ""
        self._blanks = ""  # inside, that have not gone out
        self._has_thought = False  # that is no blank

    @property
    def is_thinking(self) -> bool:
        """Whether it stands inside of thoughts."""
        return self.standing is Standing.INSIDE

    @property
    def is_past_thoughts(self) -> bool:
        """Whether what may still come is no thought."""
        return self.standing in (Standing.BETWEEN, Standing.BEHIND)

    def add(self, text: str) -> Said:
        """Go on; return what is sure by now."""
        thought: list[str] = []
        for index, character in enumerate(text):
            match self.standing:
                case Standing.BEFORE:
                    self._step_before(character)
                    if self.is_past_thoughts:
                        held, self.held = self.held, ""
                        return Said("", held + text[index + 1 :])
                case Standing.INSIDE:
                    thought.append(self._step_inside(character))
                case Standing.BETWEEN:
                    if not character.isspace():
                        self.standing = Standing.BEHIND
                        return Said("".join(thought), text[index:])
                case Standing.BEHIND:
                    return Said("".join(thought), text[index:])
        return Said("".join(thought), "")

    def finish(self, *, is_cut: bool) -> Said:
        """End the answer; return the rest of it.

        Args:
            is_cut: whether it ended by its length. Then the beginning of a mark is nothing.
        """
        held, self.held = self.held, ""
        if is_cut and held.strip():
            return Said("", "")
        if self.standing is Standing.BEFORE:
            return Said("", held)
        return Said(self._think(held) if held else "", "")

    def whole(self, text: str, *, is_cut: bool = False) -> Said:
        """Divide an answer that is whole."""
        first, rest = self.add(text), self.finish(is_cut=is_cut)
        return Said(first.thought + rest.thought, first.text + rest.text)

    def _step_before(self, character: str) -> None:
        self.held += character
        begun = self.held.lstrip()
        if begun == self._marks.begin:
            self.held, self.standing, self.has_thoughts = "", Standing.INSIDE, True
        elif not self._marks.begin.startswith(begun):
            self.standing = Standing.BEHIND

    def _step_inside(self, character: str) -> str:
        """Go on by a character; return what is sure to be thought."""
        self.held += character
        sure: list[str] = []
        while self.held and not self._marks.end.startswith(self.held):
            first, self.held = self.held[0], self.held[1:]
            if first.isspace():
                self._blanks += first
            else:
                sure.append(self._think(first))
        if self.held == self._marks.end:
            self.held, self._blanks, self.standing = "", "", Standing.BETWEEN
        return "".join(sure)

    def _think(self, text: str) -> str:
        blanks, self._blanks = self._blanks if self._has_thought else "", ""
        self._has_thought = True
        return blanks + text


def count_thought_tokens(
    begin: Callable[[], ThoughtParser],
    token_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> int:
    """How many of an answer's first tokens are thoughts, their marks included.

    Args:
        begin: makes a parser that stands where the answer begins.
        token_ids: of the answer.
        decode: token ids to text.
    """

    def read(count: int) -> ThoughtParser:
        parser = begin()
        parser.add(decode(token_ids[:count]))
        return parser

    whole = read(len(token_ids))
    if not whole.has_thoughts or whole.is_thinking:
        return len(token_ids) if whole.is_thinking else 0
    lengths = range(len(token_ids))
    return bisect_left(lengths, True, key=lambda count: read(count).is_past_thoughts)
