"""What an answer has to look like whose model thinks first: anything, then what was asked for.

Whether it thinks is up to the model, unless the chat template has begun the thoughts already. They
end with their mark, and no answer ends before it does. Where what follows would not have room any
more, the mark has to come.
"""

import codecs
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from tokendance.models.thoughts import Standing, ThoughtMarks, ThoughtParser
from tokendance.server.grammar_constraint import (
    GrammarConstraint,
    LazyConstraint,
    Mask,
    Vocabulary,
)

# Tokens of blanks between thoughts and what follows. Models write some there, and grammars do not.
_MAX_BLANKS = 2


class ThinkingConstraint(LazyConstraint):
    """A constraint that begins behind thoughts; see `engine.constraint.Constraint`."""

    def __init__(
        self,
        behind: GrammarConstraint,
        marks: ThoughtMarks,
        standing: Standing,
        max_tokens: int | None = None,
        reserve: int | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            behind: what follows thoughts; of nobody else, at its beginning.
            marks: of thoughts.
            standing: where the answer begins.
            max_tokens: that the answer may have, with its thoughts.
            reserve: tokens that what follows is to have; found out if left out.
        """
        super().__init__()
        self._behind = behind
        self._vocabulary = behind.vocabulary
        self._marks = marks
        self._standing = standing
        self._max_tokens = max_tokens
        self._reserve = behind.count_closing() if reserve is None else reserve
        self._begin()

    def _begin(self) -> None:
        self._parser = ThoughtParser(self._marks, self._standing)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Whether the text so far may be the beginning of what was asked for.
        self._may_say = self._standing is Standing.BEFORE
        self._num_blanks = 0
        self._num_tokens = 0  # before what was asked for

    def prepare(self) -> None:
        """Find out what may come next."""
        if self._forbidden is not None:
            return
        for token in self._accepted:
            self._step(token)
        self._accepted.clear()
        self._forbidden = self._find_forbidden()

    def failure(self) -> str | None:
        """Why the grammar has failed, if it has."""
        return self._behind.failure()

    def copy(self, max_tokens: int | None = None) -> "ThinkingConstraint":
        """One for another answer of at most so many tokens; while this one is at its beginning."""
        behind = self._behind.copy(max_tokens)
        return ThinkingConstraint(behind, self._marks, self._standing, max_tokens, self._reserve)

    def restart(self) -> None:
        """Go back to the beginning."""
        self._behind.restart()
        self._accepted.clear()
        self._forbidden = None
        self._begin()

    def _step(self, token: int) -> None:
        was = self._parser.standing
        if was is Standing.BEHIND:
            self._behind.accept(token)
            return
        self._num_tokens += 1
        if was is Standing.BEFORE and self._may_say:
            self._may_say = not self._behind.forbidden()[token]
            if self._may_say:
                self._behind.accept(token)
        self._parser.add(self._decoder.decode(self._vocabulary.spell(token)))
        standing = self._parser.standing
        if was is Standing.BEFORE and standing is Standing.INSIDE:
            self._behind.restart()  # it was a mark, and no text
        elif was is Standing.BETWEEN and standing is Standing.BEHIND:
            self._behind.accept(token)
        elif was is Standing.BETWEEN:
            self._num_blanks += 1
        if standing is Standing.BETWEEN and self._max_tokens is not None:
            self._behind.limit(self._max_tokens - self._num_tokens)

    @property
    def _has_to_end(self) -> bool:
        """Whether thoughts have to, so that there is room for what follows."""
        if self._max_tokens is None or self._reserve is None:
            return False
        mark = len(self._marks.end) - len(self._parser.held)  # in as many tokens at most
        return self._max_tokens - self._num_tokens <= self._reserve + mark + _MAX_BLANKS

    def _find_forbidden(self) -> Mask | None:
        """Tokens that may not come next; None if there is more to find out, at the next turn."""
        self._behind.prepare()
        if not self._behind.is_ready:
            return None
        vocabulary, marks, held = self._vocabulary, self._marks, self._parser.held.lstrip()
        match self._parser.standing:
            case Standing.BEFORE:
                begins = _goes_on(vocabulary, marks.begin, held)
                return self._behind.forbidden() & ~begins if self._may_say else ~begins
            case Standing.INSIDE if self._has_to_end:
                return ~_goes_on(vocabulary, marks.end, held)
            case Standing.INSIDE:
                return ~vocabulary.only_end | _goes_beyond(vocabulary, marks.end, held)
            case Standing.BETWEEN if self._num_blanks < _MAX_BLANKS:
                return self._behind.forbidden() & ~_is_blank(vocabulary)
        return self._behind.forbidden()


@lru_cache(32)
def _goes_on(vocabulary: Vocabulary, mark: str, held: str) -> Mask:
    """Tokens that go on with a mark whose beginning was said; bool (vocabulary,)."""
    rest = mark.removeprefix(held).encode()
    return _tokens(vocabulary, lambda data: bool(data) and rest.startswith(data))


@lru_cache(32)
def _goes_beyond(vocabulary: Vocabulary, mark: str, held: str) -> Mask:
    """Tokens that end a mark, which has begun or not, and say more; bool (vocabulary,)."""
    begun, whole = held.encode(), mark.encode()

    def goes_beyond(data: bytes) -> bool:
        return whole[-1] in data and bool((begun + data).partition(whole)[2].strip())

    return _tokens(vocabulary, goes_beyond)


@lru_cache(2)
def _is_blank(vocabulary: Vocabulary) -> Mask:
    """Tokens of blanks alone; bool (vocabulary,)."""
    return _tokens(vocabulary, lambda data: data.isspace())


def _tokens(vocabulary: Vocabulary, is_one: Callable[[bytes], bool]) -> Mask:
    size = len(vocabulary.only_end)
    return np.fromiter((is_one(vocabulary.spell(token)) for token in range(size)), np.bool_, size)
