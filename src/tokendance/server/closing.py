"""Ends answers in time: they have to be whole when their tokens are used up.

    tokens left    |=================================|
    to close it    |========|                              not yet; looked at again a quarter of
                            |~~~~~~~~ spare ~~~~~~~~~|     the spare later
    ...
    tokens left    |===========|                           now: these tokens come, and no others
    to close it    |========|

How an answer may be closed is found by following its grammar: strings, lists and objects are ended
where they may be, and what has to stand there is as short as it can be.
"""

import codecs
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llguidance
import numpy as np

from tokendance.server.json_scanner import JsonScanner

# Longer ends are not looked for.
_MOST = 256
# Tokens that are not used where a single token might begin what takes so many to close, and the
# token that ends the answer.
_SPARE = 12
_END = 1
# Seconds in which an end is looked for before others have their turn.
_TURN_S = 0.005
_COUNT_S = 0.2  # likewise, where nobody waits
# What is best next, in this order: inside of strings, and elsewhere.
_IN_STRINGS = (b'"', b"a", b"0")
_ELSEWHERE = (b"}", b"]", b",", b":", b" ", b"0", b"null", b"true", b'"', b"{", b"[")


@dataclass(frozen=True, slots=True)
class ClosingTokens:
    """What ends of answers are made of.

    Attributes:
        texts: the bytes of each token.
        in_strings: tokens that end a string soon, the best first.
        elsewhere: tokens that end a value soon, likewise.
    """

    texts: Sequence[bytes]
    in_strings: tuple[int, ...]
    elsewhere: tuple[int, ...]

    @staticmethod
    def of(texts: Sequence[bytes]) -> "ClosingTokens":
        """Those of a vocabulary."""
        index = {text: token for token, text in reversed(list(enumerate(texts)))}
        in_strings, elsewhere = (
            tuple(index[text] for text in wanted if text in index)
            for wanted in (_IN_STRINGS, _ELSEWHERE)
        )
        return ClosingTokens(texts, in_strings, elsewhere)


class Closer:
    """Watches how many tokens an answer has left, and says which come when it has to end.

    Attributes:
        path: tokens that come, in order; None while the answer is free.
    """

    def __init__(
        self, tokens: ClosingTokens, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin an answer.

        Args:
            tokens: of the model.
            max_tokens: that it may have.
            clock: seconds; a test may have its own.
        """
        self.path: list[int] | None = None
        self._tokens = tokens
        self._clock = clock
        self._num_left = max_tokens
        self._look_at = max_tokens  # when so many are left
        self._search: _Search | None = None
        # Of the ends that were found: the last, and how many tokens were left then; the longest;
        # and the most that one grew by, if by more than a token for each that was said meanwhile:
        # so it is where an object begins that has to have something.
        self._last: tuple[int, int] | None = None
        self._longest = 0
        self._growth = 0

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self._num_left -= 1
        if self.path is not None:
            self.path = self.path[1:] if self.path[:1] == [token] else None

    def look(self, matcher: "llguidance.LLMatcher", scanner: JsonScanner | None) -> bool:
        """See whether the answer has to end now, where it stands.

        Args:
            matcher: which stands there, too.
            scanner: likewise, where it is JSON.

        Returns:
            Whether that is known; if not, it is to be called again.
        """
        if self.path is not None:
            return True
        if self._search is None:
            if matcher.is_accepting() or matcher.is_stopped():
                # What may come now would not have room. Text goes on to its last token.
                if scanner is not None and self._num_left <= max(_END, self._longest):
                    self.path = []
                return True
            if self._num_left > self._look_at:
                return True
            most = min(_MOST, self._num_left - _END)
            self._search = _Search(self._tokens, matcher.deep_copy(), copy.copy(scanner), most)
        if not self._search.go_on(self._clock, self._clock() + _TURN_S):
            return False
        found, self._search = self._search.path, None
        if found is None:
            self._look_at = self._num_left // 2
            return True
        self._note(len(found))
        spare, needed = self._num_left - len(found) - _END, max(_SPARE, self._growth + 1)
        if spare <= needed:
            self.path = found
        self._look_at = self._num_left - max(1, (spare - needed) // 4)
        return True

    def _note(self, length: int) -> None:
        """Note how long an end is, and what that says of those to come."""
        self._longest = max(self._longest, length)
        if self._last is not None:
            growth, said = length - self._last[0], self._last[1] - self._num_left
            if growth > said:
                self._growth = max(self._growth, growth)
        self._last = length, self._num_left


def count_closing(
    tokens: ClosingTokens, matcher: "llguidance.LLMatcher", scanner: JsonScanner | None
) -> int | None:
    """Tokens that are enough for an answer as short as it can be; None if that is not found soon.

    The matcher is somebody else's, at its beginning, and stays there.
    """
    search = _Search(tokens, matcher.deep_copy(), copy.copy(scanner), _MOST)
    is_done = search.go_on(time.monotonic, time.monotonic() + _COUNT_S)
    return len(search.path) + _SPARE + _END if is_done and search.path is not None else None


class _Search:
    """Looks for tokens that close an answer.

    Attributes:
        path: found; None if there is none that is short enough.
    """

    def __init__(
        self,
        tokens: ClosingTokens,
        matcher: "llguidance.LLMatcher",
        scanner: JsonScanner | None,
        most: int,
    ) -> None:
        """Begin with a matcher and a scanner of nobody else; at most so many tokens."""
        self.path: list[int] | None = []
        self._tokens = tokens
        self._matcher = matcher
        self._scanner = scanner or JsonScanner()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._most = most

    def go_on(self, clock: Callable[[], float], until_s: float) -> bool:
        """Look for a while, for a token at least; return whether it is done."""
        assert self.path is not None
        while not (self._matcher.is_accepting() or self._matcher.is_stopped()):
            if len(self.path) >= self._most or self._matcher.is_error():
                self.path = None
                return True
            for token in self._matcher.compute_ff_tokens() or [self._next()]:
                self.path.append(token)
                self._matcher.consume_token(token)
                for character in self._decoder.decode(self._tokens.texts[token]):
                    self._scanner.add(character)
            if clock() > until_s:  # behind a step, so that each turn comes nearer to the end
                return False
        if self._matcher.is_error() or len(self.path) > self._most:
            self.path = None
        return True

    def _next(self) -> int:
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        tokens = self._tokens
        for token in tokens.in_strings if self._scanner.in_string else tokens.elsewhere:
            if allowed[token]:
                return token
        return int(allowed.argmax())
