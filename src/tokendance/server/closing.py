"""Ends answers in time: they have to be whole when their tokens are used up.

    tokens left    |=================================|
    to close it    |========|~~~~~~~~ spare ~~~~~~~~~|

Each token that may come begins so many things at most, and each of them takes so many tokens at
most to be ended again (`shortest.py`). What it could raise the end by is added to the end that was
found last, so most tokens cost a sum; a token that could take more than is to spare does not come.

    spare          more than any token could take:     all may come
                   more than most could take:          those that could take less
                   less:                               the end is found again; those that could take
                                                       less, and the next token of the end

How an answer may be closed is found by following its grammar: strings, lists and objects are ended
where they may be, and what has to stand there is as short as it can be.
"""

import codecs
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.server.json_scanner import JsonScanner
from tokendance.server.short_texts import Short
from tokendance.server.shortest import Endings

Mask = npt.NDArray[np.bool_]
Choices = npt.NDArray[np.int64]

# Longer ends are not looked for before an answer begins.
_MOST = 4096
# Tokens that are kept for what is begun and no choice: a number, an escape, a character of several
# tokens; and the token that ends the answer.
_SPARE = 12
_END = 1
# Choices of a token that the spare is for, where it is enough; with more of them, a token is rare.
_USUAL = 2
# More of them than any answer has tokens.
_ENDLESS = 2**40
# Ends that are tried in one place, and ways to write them that are remembered.
_MOST_TRIED = 512
_MOST_WRITTEN = 4096
# Of a name, and of a text behind it that has begun.
_QUOTES = 3
# Characters of an answer by which to know what it is about to say.
TAIL = 256
# Seconds in which an end is looked for before others have their turn.
_TURN_S = 0.005
_COUNT_S = 0.2  # likewise, where nobody waits
# What is best next, in this order: inside of strings; and elsewhere, before and behind what the
# schema says.
_IN_STRINGS = (b'"', b"a", b"0")
_CLOSING = (b"}", b"]")
_ELSEWHERE = (b",", b":", b" ", b"0", b"null", b"true", b'"', b"{", b"[")
_PRINTABLE = [bytes([code]) for code in range(32, 127) if code not in b'"\\']
_BEGINNING = b"{[,:"  # of another choice, behind them


class ClosingTokens:
    """What ends of answers are made of.

    Attributes:
        texts: the bytes of each token.
        in_strings: tokens that end a string soon, the best first.
        closing: tokens that end an object or a list.
        elsewhere: tokens that end a value soon, the best first.
        printable: tokens of a character each that all may come in a text that is free.
        choices: how many choices each token makes at most, int64 (vocabulary,): outside of strings;
            in strings; in strings that are free, where what does not end them makes none.
    """

    def __init__(self, texts: Sequence[bytes], tokenize: Callable[[str], list[int]]) -> None:
        """Those of a vocabulary, by which a text can be tokenized."""
        self.texts = texts
        self._tokenize = tokenize
        index = {text: token for token, text in reversed(list(enumerate(texts)))}
        self.in_strings, self.closing, self.elsewhere, self.printable = (
            tuple(index[text] for text in wanted if text in index)
            for wanted in (_IN_STRINGS, _CLOSING, _ELSEWHERE, _PRINTABLE)
        )
        outside = np.array([1 + _count_begins(text) for text in texts], np.int64)
        behind = [text.partition(b'"') for text in texts]
        free = np.array([quote != b"" and 1 + _count_begins(rest) for _, quote, rest in behind])
        self.choices = outside, np.maximum(1, free).astype(np.int64), free.astype(np.int64)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """A text in tokens, which need not be those of the model's tokenizer."""
        return tuple(self._tokenize(text))


def _count_begins(text: bytes) -> int:
    return sum(map(text.count, (bytes([one]) for one in _BEGINNING)))


class Ends:
    """How the answers of one grammar may be ended, and by how much a choice may delay it.

    Attributes:
        tokens: of the model.
        is_text: whether a text that may end may go on to its last token.
        growth: tokens that the end is longer by, at most, for each choice.
    """

    def __init__(self, tokens: ClosingTokens, endings: Endings, *, is_text: bool = False) -> None:
        self.tokens = tokens
        self.is_text = is_text
        self._has_patterns = endings.has_patterns
        self._endings = endings
        self._written: dict[str, tuple[int, ...]] = {}
        growth = max((self._count(one) for one in endings.choices), default=0)
        self.growth = _ENDLESS if endings.is_endless else min(growth, _ENDLESS)

    def _count(self, one: Short) -> int:
        """Tokens for a short text, which may come in pieces."""
        return min(one.cost, 2 * len(self.write(one.text)) + 2) if one.is_whole else one.cost

    @cached_property
    def _values(self) -> list[str]:
        return _texts(self._endings.values)[:_MOST_TRIED]

    @cached_property
    def _rests(self) -> list[str]:
        return _texts(self._endings.rests)[:_MOST_TRIED]

    @cached_property
    def _members(self) -> list[str]:
        return _texts(self._endings.members)[:_MOST_TRIED]

    def write(self, text: str) -> tuple[int, ...]:
        """A text in tokens."""
        tokens = self._written.get(text)
        if tokens is None:
            tokens = self.tokens.tokenize(text)
            if len(self._written) < _MOST_WRITTEN:
                self._written[text] = tokens
        return tokens

    def choices(self, scanner: JsonScanner | None, forbidden: Mask) -> Choices:
        """How many choices each token makes at most, where an answer stands."""
        outside, in_strings, in_free_strings = self.tokens.choices
        if scanner is None or not scanner.in_string:
            return outside
        is_free = not self._has_patterns and not forbidden[list(self.tokens.printable)].any()
        return in_free_strings if is_free else in_strings

    def go_on(self, tail: str, *, in_string: bool) -> Iterator[tuple[int, ...]]:
        """Ways to go on behind a text, the best first; the grammar may not allow them."""
        tokens = self.tokens
        begun = tail[tail.rfind('"') :] if in_string else ""
        for token in () if in_string else tokens.closing:
            yield (token,)
        # An object's end may have begun with the name of the value that comes.
        quotes = [place for place, character in enumerate(tail) if character == '"']
        for quote in quotes[-_QUOTES:]:
            yield from self._write_rest(self._rests, tail[quote:])
        if not in_string:
            yield from self._write_rest(self._rests, "")
        yield from self._write_rest(self._values, begun)
        for token in tokens.in_strings[:1] if in_string else ():
            yield (token,)
        yield from self._write_rest(self._members, begun)
        for token in tokens.in_strings if in_string else tokens.elsewhere:
            yield (token,)

    def _write_rest(self, texts: Sequence[str], begun: str) -> Iterator[tuple[int, ...]]:
        for text in texts:
            if text.startswith(begun) and len(text) > len(begun):
                yield self.write(text[len(begun) :])


def _texts(found: set[Short]) -> list[str]:
    ordered = sorted(found, key=attrgetter("order"))
    return list(dict.fromkeys(one.text for one in ordered if one.text))


class Closer:
    """Watches how many tokens an answer has left, and says which may come so that it can end.

    Attributes:
        path: tokens that end the answer where it stands; None where that is not known.
    """

    def __init__(
        self, ends: Ends, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin an answer.

        Args:
            ends: of its grammar.
            max_tokens: that it may have.
            clock: seconds; a test may have its own.
        """
        self.path: list[int] | None = None
        self._ends = ends
        self._clock = clock
        self._num_left = max_tokens
        self._length: int | None = None  # of the end, at most
        self._look_at = max_tokens  # when so many are left, where there was no end that is so short
        self._search: _Search | None = None
        self._choices = ends.tokens.choices[0]  # of each token that may come next
        self._most_growth = int(self._choices.max()) * ends.growth

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self._num_left -= 1
        if self.path and self.path[0] == token:
            self.path = self.path[1:]
            self._length = len(self.path)
        else:
            self.path = None
            if self._length is not None:
                self._length += int(self._choices[token]) * self._ends.growth

    @property
    def _spare(self) -> int:
        """Tokens that the end may grow by with the next; it is known."""
        assert self._length is not None
        return self._num_left - self._length - _END - _SPARE - 1

    def look(self, matcher: "llguidance.LLMatcher", scanner: JsonScanner | None, tail: str) -> bool:
        """See how the answer may end, where it stands, if that has to be known.

        Args:
            matcher: which stands there, too.
            scanner: likewise, where it is JSON.
            tail: the last characters of the answer.

        Returns:
            Whether that is known; if not, it is to be called again.
        """
        if self._search is None:
            if matcher.is_accepting() or matcher.is_stopped():
                self.path, self._length = [], 0
                return True
            if self.path is not None or self._num_left > self._look_at:
                return True
            if self._length is not None and self._spare >= _USUAL * self._ends.growth:
                return True
            copies = matcher.deep_copy(), copy.copy(scanner)
            self._search = _Search(self._ends, *copies, tail, self._num_left)
        if not self._search.go_on(self._clock, self._clock() + _TURN_S):
            return False
        self.path, self._search = self._search.path, None
        if self.path is None:
            self._length, self._look_at = None, self._num_left // 2
        else:
            self._length, self._look_at = len(self.path), self._num_left
        return True

    def limit(self, forbidden: Mask, scanner: JsonScanner | None, only_end: Mask) -> Mask:
        """Forbid also what would take more than is left; neither mask is changed.

        Args:
            forbidden: tokens that may not come, bool (vocabulary,).
            scanner: where the answer stands, if it is JSON.
            only_end: forbids all tokens but those that end an answer.
        """
        if self._length is None or (self._ends.is_text and scanner is None):
            return forbidden
        self._choices = self._ends.choices(scanner, forbidden)
        spare = self._spare
        if spare >= self._most_growth:
            return forbidden
        limited: Mask = self._choices * self._ends.growth > spare
        limited |= forbidden
        if self.path:
            limited[self.path[0]] = False
        elif self.path is not None:
            limited &= forbidden | only_end
        return forbidden if limited.all() else limited


def count_closing(
    ends: Ends, matcher: "llguidance.LLMatcher", scanner: JsonScanner | None
) -> int | None:
    """Tokens that are enough for an answer as short as it can be; None if that is not found soon.

    The matcher is somebody else's, at its beginning, and stays there.
    """
    search = _Search(ends, matcher.deep_copy(), copy.copy(scanner), "", _MOST)
    is_done = search.go_on(time.monotonic, time.monotonic() + _COUNT_S)
    return len(search.path) + _SPARE + _END if is_done and search.path is not None else None


class _Search:
    """Looks for tokens that close an answer.

    Attributes:
        path: found; None if there is none that is short enough.
    """

    def __init__(
        self,
        ends: Ends,
        matcher: "llguidance.LLMatcher",
        scanner: JsonScanner | None,
        tail: str,
        most: int,
    ) -> None:
        """Begin with a matcher and a scanner of nobody else; at most so many tokens."""
        self.path: list[int] | None = []
        self._ends = ends
        self._matcher = matcher
        self._scanner = scanner or JsonScanner()
        self._tail = tail
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._most = most

    def go_on(self, clock: Callable[[], float], until_s: float) -> bool:
        """Look for a while, for a token at least; return whether it is done."""
        assert self.path is not None
        while not (self._matcher.is_accepting() or self._matcher.is_stopped()):
            if len(self.path) >= self._most or self._matcher.is_error():
                self.path = None
                return True
            for token in self._matcher.compute_ff_tokens() or self._next():
                self.path.append(token)
                self._matcher.consume_token(token)
                text = self._decoder.decode(self._ends.tokens.texts[token])
                self._tail = (self._tail + text)[-TAIL:]
                for character in text:
                    self._scanner.add(character)
            if clock() > until_s:  # behind a step, so that each turn comes nearer to the end
                return False
        if self._matcher.is_error() or len(self.path) > self._most:
            self.path = None
        return True

    def _next(self) -> Sequence[int]:
        """The next tokens, of those that may come."""
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        for way in self._ends.go_on(self._tail, in_string=self._scanner.in_string):
            is_allowed = bool(allowed[way[0]])
            if is_allowed and len(way) > 1:
                is_allowed = self._matcher.validate_tokens(list(way)) == len(way)
            if is_allowed:
                return way
        return [int(allowed.argmax())]
