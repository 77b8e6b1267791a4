"""The state of a grammar within one answer, and what keeps an answer from running on for ever.

A grammar allows numbers of any length, and blanks without end; small models make use of it. So
numbers and runs of blanks are bounded, wherever the grammar allows anything else. A call that
repeats the one before it is the last.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.engine.constraint import Constraint
from tokendance.server.call_parser import CallParser
from tokendance.server.closing import TAIL, Closer, ClosingTokens, Ends, count_closing
from tokendance.server.grammar_process import error_of
from tokendance.server.json_scanner import JsonScanner

Mask = npt.NDArray[np.bool_]

# Digits before and behind the point, and of an exponent; blanks in a row.
_MAX_DIGITS = 20
_MAX_EXPONENT_DIGITS = 2
_MAX_BLANKS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a constraint knows of the model's tokens.

    Attributes:
        texts: the bytes of each token.
        only_end: forbids all tokens but those that end an answer: bool (vocabulary,).
        digits: tokens that begin with a digit, likewise.
        blanks: tokens that begin with a blank, or with a backslash, which may write one.
        closing: what ends answers.
    """

    texts: Sequence[bytes]
    only_end: Mask
    digits: Mask
    blanks: Mask
    closing: ClosingTokens

    def spell(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.texts[token]


class AnswerConstraint(Constraint, Protocol):
    """What one answer has to look like, and other answers to the same request."""

    def copy(self, max_tokens: int | None = None) -> "AnswerConstraint":
        """One for another answer of at most so many tokens; while this one is at its beginning."""
        ...


class LazyConstraint(ABC):
    """Finds out what may come next when somebody asks; `prepare` is left to each kind."""

    def __init__(self, first: Mask | None = None) -> None:
        """Begin an answer, of which is known what may not come first, or not."""
        self._forbidden = first
        self._accepted: list[int] = []  # since `prepare` has looked

    @property
    def is_ready(self) -> bool:
        """Whether `forbidden` answers at once."""
        return self._forbidden is not None

    @abstractmethod
    def prepare(self) -> None:
        """Find out what may come next, or a part of it."""

    def forbidden(self) -> Mask:
        """Tokens that may not come next: bool (vocabulary,)."""
        while self._forbidden is None:
            self.prepare()
        return self._forbidden

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self._accepted.append(token)
        self._forbidden = None


class AnswerWatch:
    """Follows the text of one answer, to say what would let it run on.

    Attributes:
        tail: its last characters.
    """

    def __init__(self, parser: CallParser | None, *, is_json: bool) -> None:
        """Begin an answer.

        Args:
            parser: of its calls, if it may call.
            is_json: whether all of it is JSON, marks of calls aside; else its calls are.
        """
        self.tail = ""
        self._parser = parser
        self._scanner = JsonScanner() if is_json else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        """Go on by a token."""
        text = self._decoder.decode(data)
        self.tail = (self.tail + text)[-TAIL:]
        if self._parser is not None:
            self._parser.add(text)
        if self._scanner is not None:
            for character in text:
                self._scanner.add(character)

    @property
    def scanner(self) -> JsonScanner | None:
        """Where the answer stands in JSON; None where it is none."""
        if self._scanner is not None or self._parser is None:
            return self._scanner
        return self._parser.scanner

    @property
    def must_end(self) -> bool:
        """Whether the answer has said all, since it repeats itself."""
        return self._parser is not None and self._parser.num_repeated > 0

    def forbids(self, vocabulary: Vocabulary) -> Mask | None:
        """Tokens that may not come next, if any other may."""
        scanner = self.scanner
        if scanner is None:
            return None
        most = _MAX_EXPONENT_DIGITS if scanner.in_exponent else _MAX_DIGITS
        if scanner.num_digits >= most:
            return vocabulary.digits
        return vocabulary.blanks if scanner.num_blanks >= _MAX_BLANKS else None


class GrammarConstraint(LazyConstraint):
    """The state of a grammar within one answer; see `engine.constraint.Constraint`.

    Attributes:
        vocabulary: of the model.
    """

    def __init__(
        self,
        matcher: "llguidance.LLMatcher",
        vocabulary: Vocabulary,
        first: Mask,
        watch: Callable[[], AnswerWatch],
        ends: Ends,
        max_tokens: int | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            matcher: of nobody else, at its beginning.
            vocabulary: of the model.
            first: what may not come first. No mask is changed.
            watch: begins to follow an answer.
            ends: how it may be closed.
            max_tokens: that the answer may have; it is closed before they are used up.
        """
        super().__init__(first if max_tokens is None else None)
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._first = first
        self._begin_watch = watch
        self._ends = ends
        self._max_tokens = max_tokens
        self._watch, self._closer = watch(), self._begin_closer()

    def prepare(self) -> None:
        """Find out what may come next, most often in 0.1 ms."""
        if self._forbidden is not None:
            return
        for token in self._accepted:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
                self._watch.add(self.vocabulary.spell(token))
            if self._closer is not None:
                self._closer.accept(token)
        self._accepted.clear()
        if self._watch.must_end and self.failure() is None:
            self._forbidden = self.vocabulary.only_end
            return
        closer = self._closer if self.failure() is None else None
        scanner, tail = self._watch.scanner, self._watch.tail
        if closer is not None and not closer.look(self._matcher, scanner, tail):
            return  # there is more to find out, at the next turn
        forbidden = mask_of(self._matcher, self.vocabulary.only_end)
        if (more := self._watch.forbids(self.vocabulary)) is not None:
            with_more = forbidden | more
            forbidden = forbidden if with_more.all() else with_more
        if closer is not None:
            forbidden = closer.limit(forbidden, scanner, self.vocabulary.only_end)
        self._forbidden = forbidden

    def failure(self) -> str | None:
        """Why the grammar has failed, if it has."""
        return error_of(self._matcher)

    def copy(self, max_tokens: int | None = None) -> "GrammarConstraint":
        """One for another answer of at most so many tokens; while this one is at its beginning."""
        matcher = self._matcher.deep_copy()
        begin = self._first, self._begin_watch, self._ends
        return GrammarConstraint(matcher, self.vocabulary, *begin, max_tokens)

    def count_closing(self) -> int | None:
        """Tokens that are enough for an answer; None if that is not known; at its beginning."""
        return count_closing(self._ends, self._matcher, self._watch.scanner)

    def limit(self, max_tokens: int | None) -> None:
        """Let the answer have so many tokens; while it is at its beginning."""
        self._max_tokens = max_tokens
        self._closer = self._begin_closer()
        self._forbidden = None

    def _begin_closer(self) -> Closer | None:
        if self._max_tokens is None:
            return None
        return Closer(self._ends, self._max_tokens)

    def restart(self) -> None:
        """Go back to the beginning."""
        self._matcher.reset()
        self._watch, self._closer = self._begin_watch(), self._begin_closer()
        self._accepted.clear()
        self._forbidden = self._first if self._max_tokens is None else None


def mask_of(matcher: "llguidance.LLMatcher", only_end: Mask) -> Mask:
    """What a matcher does not allow next: bool (vocabulary,)."""
    if matcher.is_stopped():
        return only_end
    allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
    forbidden: Mask = allowed[: len(only_end)] == 0
    return forbidden
