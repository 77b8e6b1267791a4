"""Reads an answer as it grows: what of it is text, and what are calls of tools.

    TEXT --mark--> HEAD --{"name": "x", "arguments": --> ARGUMENTS --}--> TAIL --end mark--> TEXT

It goes by characters, so it makes no difference in what pieces a text comes. What may turn out to
be the beginning of a mark is held back, and so are blanks before it, which belong to nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from tokendance.server.json_scanner import JsonScanner
from tokendance.server.tool_format import ToolFormat


@dataclass(frozen=True, slots=True)
class Text:
    """More of an answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what was thought before; no parser of calls sees it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a function; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the last call, a part of a JSON text."""

    text: str


Piece = Text | Thought | CallBegins | Arguments


class _State(Enum):
    TEXT = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()


class CallParser:
    """Divides one answer into text and calls.

    A call that repeats the one before it word for word is left out. So a call goes out once it
    differs from the one before.

    Attributes:
        num_calls: that have begun and gone out.
        num_repeated: that were left out.
    """

    def __init__(self, tool_format: ToolFormat, names: Iterable[str]) -> None:
        """Begin an answer that may call functions of these names."""
        self.num_calls = 0
        self.num_repeated = 0
        self._mark = tool_format.begin.strip()
        self._tail = tool_format.end.strip()
        # What stands between the mark and the arguments, by the name of a function.
        self._heads = {tool_format.head(name).rstrip(): name for name in names}
        # Without a mark, a call is recognized at the beginning of an answer only.
        self._state = _State.TEXT if self._mark else _State.HEAD
        self._held = ""  # of the state: the beginning of a mark, head or tail
        self._blanks = ""  # that have not gone out, before what is held
        self._has_text = False
        self._text_after_call = False
        self._name = ""
        self._arguments: list[str] = []
        self._scanner = JsonScanner()
        self._last_call: tuple[str, str] | None = None
        self._may_repeat = False  # whether the call is, so far, the beginning of the last one
        self._pieces: list[Piece] = []

    @property
    def scanner(self) -> JsonScanner | None:
        """Where in the arguments of a call the answer stands; None outside of them."""
        return self._scanner if self._state is _State.ARGUMENTS else None

    @property
    def ends_with_call(self) -> bool:
        """Whether the last thing so far is a call that is whole, its end mark included."""
        is_between = self._state is _State.TEXT and not self._held
        return is_between and self.num_calls > 0 and not self._text_after_call

    @property
    def is_in_call(self) -> bool:
        """Whether a call has begun whose arguments are not whole."""
        is_named = self._state is _State.HEAD and bool(self._mark)
        return is_named or self._state is _State.ARGUMENTS

    def add(self, text: str) -> list[Piece]:
        """Go on; return what is sure by now."""
        for character in text:
            self._step(character)
        return self._take()

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """End the answer; return the rest of it.

        Args:
            is_cut: whether it ended by its length. Then the beginning of a mark is no text.
        """
        if self._state is _State.TEXT or (self._state is _State.HEAD and not self._mark):
            rest = "" if is_cut else self._held
            if not self.num_calls or rest:
                self._say(self._blanks + rest if self._keeps_blanks else rest)
        return self._take()

    def _take(self) -> list[Piece]:
        """The pieces so far, neighbours of one kind joined."""
        joined: list[Piece] = []
        for piece in self._pieces:
            last = joined[-1] if joined else None
            if isinstance(piece, Text) and isinstance(last, Text):
                joined[-1] = Text(last.text + piece.text)
            elif isinstance(piece, Arguments) and isinstance(last, Arguments):
                joined[-1] = Arguments(last.text + piece.text)
            else:
                joined.append(piece)
        self._pieces.clear()
        return joined

    def _step(self, character: str) -> None:
        match self._state:
            case _State.TEXT:
                self._step_text(character)
            case _State.HEAD:
                self._step_head(character)
            case _State.ARGUMENTS:
                self._step_arguments(character)
            case _State.TAIL:
                self._step_tail(character)

    def _step_text(self, character: str) -> None:
        self._held += character
        while self._held and not (self._mark and self._mark.startswith(self._held)):
            first, self._held = self._held[0], self._held[1:]
            if first.isspace():
                self._blanks += first
            else:
                self._say(self._blanks + first if self._keeps_blanks else first)
                self._blanks = ""
        if self._mark and self._held == self._mark:
            self._state, self._held = _State.HEAD, ""

    def _step_head(self, character: str) -> None:
        self._held += character
        head = self._held.lstrip()
        if head in self._heads:
            self._begin_call(self._heads[head])
        elif not any(one.startswith(head) for one in self._heads):
            self._is_text(self._mark, self._held)  # it is no call after all

    def _is_text(self, mark: str, held: str) -> None:
        """Take what was held for text, in which another mark may begin behind the first."""
        self._state, self._held = _State.TEXT, ""
        if mark:
            self._say(self._blanks + mark if self._keeps_blanks else mark)
            self._blanks = ""
        for character in held:
            self._step(character)

    def _begin_call(self, name: str) -> None:
        self._state, self._held = _State.ARGUMENTS, ""
        self._name, self._arguments, self._scanner = name, [], JsonScanner()
        self._may_repeat = self._last_call is not None and self._last_call[0] == name
        if not self._may_repeat:
            self._send_call()

    def _step_arguments(self, character: str) -> None:
        if not self._arguments and character.isspace():
            return
        self._scanner.add(character)
        if self._scanner.depth < 0:
            self._end_call()
            return
        self._arguments.append(character)
        if not self._may_repeat:
            self._pieces.append(Arguments(character))
        else:
            assert self._last_call is not None
            number, arguments = len(self._arguments) - 1, self._last_call[1]
            if number >= len(arguments) or arguments[number] != character:
                self._send_call()

    def _send_call(self) -> None:
        self._may_repeat = False
        self._text_after_call = False
        self.num_calls += 1
        self._pieces += [CallBegins(self._name), *map(Arguments, self._arguments)]

    def _end_call(self) -> None:
        call = self._name, "".join(self._arguments)
        if self._may_repeat and call == self._last_call:
            self.num_repeated += 1
        elif self._may_repeat:
            self._send_call()
        self._last_call = call
        self._state = _State.TAIL if self._tail else _State.TEXT

    def _step_tail(self, character: str) -> None:
        self._held += character
        tail = self._held.lstrip()
        if tail == self._tail:
            self._state, self._held = _State.TEXT, ""
        elif not self._tail.startswith(tail):
            self._is_text("", self._held)

    @property
    def _keeps_blanks(self) -> bool:
        return self._has_text or not self.num_calls

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))
            if not text.isspace():
                self._has_text = True
                self._text_after_call = True


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function, with its arguments as JSON; a part of it, if the answer was cut off."""

    name: str
    arguments: str


def join(pieces: Sequence[Piece]) -> tuple[str, list[Call]]:
    """The text and the calls that pieces of an answer make."""
    text: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for piece in pieces:
        match piece:
            case Text():
                text.append(piece.text)
            case CallBegins():
                calls.append((piece.name, []))
            case Arguments():
                calls[-1][1].append(piece.text)
    return "".join(text), [Call(name, "".join(parts)) for name, parts in calls]
