"""The state of a grammar within one answer, and what keeps an answer from running on for ever.

A grammar allows numbers of any length, and blanks without end; small models make use of it. So
numbers and runs of blanks are bounded, wherever the grammar allows anything else. A call that
repeats the one before it is the last.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.engine.constraint import Constraint
from tokendance.server.call_parser import CallParser
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
    """

    texts: Sequence[bytes]
    only_end: Mask
    digits: Mask
    blanks: Mask

    def spell(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.texts[token]


class AnswerConstraint(Constraint, Protocol):
    """What one answer has to look like, and other answers to the same request."""

    def copy(self) -> "AnswerConstraint":
        """One for another answer; while this one is at its beginning."""
        ...


class AnswerWatch:
    """Follows the text of one answer, to say what would let it run on."""

    def __init__(self, parser: CallParser | None, *, is_json: bool) -> None:
        """Begin an answer.

        Args:
            parser: of its calls, if it may call.
            is_json: whether all of it is JSON, marks of calls aside; else its calls are.
        """
        self._parser = parser
        self._scanner = JsonScanner() if is_json else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        """Go on by a token."""
        text = self._decoder.decode(data)
        if self._parser is not None:
            self._parser.add(text)
        if self._scanner is not None:
            for character in text:
                self._scanner.add(character)

    @property
    def must_end(self) -> bool:
        """Whether the answer has said all, since it repeats itself."""
        return self._parser is not None and self._parser.num_repeated > 0

    def forbids(self, vocabulary: Vocabulary) -> Mask | None:
        """Tokens that may not come next, if any other may."""
        scanner = self._scanner or (self._parser.scanner if self._parser is not None else None)
        if scanner is None:
            return None
        most = _MAX_EXPONENT_DIGITS if scanner.in_exponent else _MAX_DIGITS
        if scanner.num_digits >= most:
            return vocabulary.digits
        return vocabulary.blanks if scanner.num_blanks >= _MAX_BLANKS else None


class GrammarConstraint:
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
    ) -> None:
        """Begin an answer.

        Args:
            matcher: of nobody else, at its beginning.
            vocabulary: of the model.
            first: what may not come first. No mask is changed.
            watch: begins to follow an answer.
        """
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._first = first
        self._begin_watch = watch
        self._watch = watch()
        self._forbidden: Mask | None = first
        self._accepted: list[int] = []  # and not told to the matcher

    @property
    def is_ready(self) -> bool:
        """Whether `forbidden` answers at once."""
        return self._forbidden is not None

    def prepare(self) -> None:
        """Find out what may come next, most often in 0.1 ms."""
        if self._forbidden is not None:
            return
        for token in self._accepted:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
                self._watch.add(self.vocabulary.spell(token))
        self._accepted.clear()
        if self._watch.must_end and self.failure() is None:
            self._forbidden = self.vocabulary.only_end
            return
        forbidden = mask_of(self._matcher, self.vocabulary.only_end)
        if (more := self._watch.forbids(self.vocabulary)) is not None:
            with_more = forbidden | more
            forbidden = forbidden if with_more.all() else with_more
        self._forbidden = forbidden

    def forbidden(self) -> Mask:
        """Tokens that may not come next: bool (vocabulary,)."""
        self.prepare()
        assert self._forbidden is not None
        return self._forbidden

    def failure(self) -> str | None:
        """Why the grammar has failed, if it has."""
        return error_of(self._matcher)

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self._accepted.append(token)
        self._forbidden = None

    def copy(self) -> "GrammarConstraint":
        """One for another answer; while this one is at its beginning."""
        matcher = self._matcher.deep_copy()
        return GrammarConstraint(matcher, self.vocabulary, self._first, self._begin_watch)

    def restart(self) -> None:
        """Go back to the beginning."""
        self._matcher.reset()
        self._watch = self._begin_watch()
        self._accepted.clear()
        self._forbidden = self._first


def mask_of(matcher: "llguidance.LLMatcher", only_end: Mask) -> Mask:
    """What a matcher does not allow next: bool (vocabulary,)."""
    if matcher.is_stopped():
        return only_end
    allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
    forbidden: Mask = allowed[: len(only_end)] == 0
    return forbidden
