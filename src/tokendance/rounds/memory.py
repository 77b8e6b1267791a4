"""What discovery remembers: texts, found again by any few tokens that they have in a row.

A gram is so many tokens in a row. All grams of all texts are kept in one sorted array, so whether a
new prompt has anything in common with thousands of earlier ones is a binary search for each of its
grams, and only the texts that it meets there are compared with it.
"""

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.rounds.segments import TokenIds

Words = npt.NDArray[np.uint64]

_ZERO = np.uint64(0)
# Its id twice, in the text and in the key; its gram in the text and among all; whose that is.
_TOKEN_BYTES = 4 + 4 + 8 + 8 + 8


class GramHasher:
    """Hashes of all grams: token ids become random numbers, the digits of a number modulo 2^64.

    A rolling hash (Rabin and Karp, IBM Journal of Research and Development 31, 1987). The random
    numbers are drawn anew for each hasher, so nobody can write texts that collide. A collision does
    no harm beyond a needless cut: segments are known by another hash.
    """

    def __init__(self, gram: int) -> None:
        """Hash grams of `gram` tokens."""
        self.gram = gram
        self._digits = np.zeros(0, np.uint64)
        self._base = np.uint64(secrets.randbits(64) | 1)
        self._inverse = np.uint64(pow(int(self._base), -1, 2**64))

    def hashes(self, token_ids: TokenIds) -> Words:
        """Hash the gram at each position but the last few; never 0."""
        count = len(token_ids) - self.gram + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        powers = self._powers(self._base, len(token_ids))
        sums = np.cumsum(self._digit(token_ids) * powers, dtype=np.uint64)
        sums = np.concatenate(([_ZERO], sums))
        grams = (sums[self.gram :] - sums[: -self.gram]) * self._powers(self._inverse, count)
        found: Words = np.maximum(grams, np.uint64(1))
        return found

    def _digit(self, token_ids: TokenIds) -> Words:
        largest = int(token_ids.max())
        if largest >= len(self._digits):
            raw = secrets.token_bytes(8 * (largest + 1 - len(self._digits)))
            self._digits = np.concatenate((self._digits, np.frombuffer(raw, np.uint64)))
        digits: Words = self._digits[token_ids]
        return digits

    @staticmethod
    def _powers(base: np.uint64, count: int) -> Words:
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        return np.cumprod(powers, dtype=np.uint64)


@dataclass(slots=True, eq=False)
class Text:
    """A text that is remembered.

    Attributes:
        token_ids: int32.
        grams: hashes of its grams.
        is_prompt: a whole prompt, else a piece that several prompts had.
        used_s: when a prompt last had something of it.
        number: of the texts, in the order in which they were added.
    """

    token_ids: TokenIds
    grams: Words
    is_prompt: bool
    used_s: float
    number: int


class TextMemory:
    """Texts by their grams; those that were met longest ago are forgotten first."""

    def __init__(self, max_tokens: int, prompts_s: float) -> None:
        """Begin with nothing.

        Args:
            max_tokens: of all texts together.
            prompts_s: seconds after which a whole prompt is forgotten that nothing has met.
        """
        self._max_tokens = max_tokens
        self._prompts_s = prompts_s
        self._texts: OrderedDict[int, Text] = OrderedDict()  # met longest ago first
        self._numbers: dict[tuple[bytes, bool], int] = {}
        self._next = 0
        self._num_tokens = 0
        self._grams = np.zeros(0, np.uint64)  # of all texts, ascending
        self._holders = np.zeros(0, np.int64)  # the number of each gram's text

    @property
    def num_bytes(self) -> int:
        """Of all texts, and of what finds them."""
        return self._num_tokens * _TOKEN_BYTES

    def meet(self, grams: Words, now: float) -> list[Text]:
        """Texts that have any of these grams, those met longest ago first; all are met now."""
        self._forget(
            [
                number
                for number, text in self._texts.items()
                if text.is_prompt and now - text.used_s > self._prompts_s
            ]
        )
        # Where each gram begins and ends among all; a gram may stand in a text a thousand times.
        grams = np.unique(grams)
        edges = np.zeros(len(self._grams) + 1, np.int64)
        np.add.at(edges, np.searchsorted(self._grams, grams, "left"), 1)
        np.add.at(edges, np.searchsorted(self._grams, grams, "right"), -1)
        met = set(np.unique(self._holders[np.cumsum(edges)[:-1] > 0]).tolist())
        found = []
        for number in [number for number in self._texts if number in met]:
            text = self._texts[number]
            text.used_s = now
            self._texts.move_to_end(number)
            found.append(text)
        return found

    def add(self, texts: Iterable[tuple[TokenIds, Words]], now: float, *, is_prompt: bool) -> None:
        """Remember texts that came together; one that is too long for this memory is not.

        Args:
            texts: token ids of each, and hashes of its grams.
            now: clock time in seconds.
            is_prompt: whether they are whole prompts.
        """
        added: list[Text] = []
        for token_ids, grams in texts:
            key = (token_ids.tobytes(), is_prompt)
            if key in self._numbers:
                number = self._numbers[key]
                self._texts[number].used_s = now
                self._texts.move_to_end(number)
            elif len(grams) > 0 and len(token_ids) <= self._max_tokens:
                # A piece is cut from a prompt, and would keep all of it.
                text = Text(token_ids.copy(), grams, is_prompt, now, self._next)
                self._texts[text.number] = text
                self._numbers[key] = text.number
                self._num_tokens += len(token_ids)
                self._next += 1
                added.append(text)
        self._forget(self._oldest(self._num_tokens - self._max_tokens))
        self._index([text for text in added if text.number in self._texts])

    def _oldest(self, num_tokens: int) -> list[int]:
        """Texts that were met longest ago, with at least so many tokens together."""
        oldest = []
        for number, text in self._texts.items():
            if num_tokens <= 0:
                break
            oldest.append(number)
            num_tokens -= len(text.token_ids)
        return oldest

    def _index(self, texts: Sequence[Text]) -> None:
        """Put the grams of texts among all, in one go: each time all of them are copied."""
        if not texts:
            return
        grams = np.concatenate([text.grams for text in texts])
        holders = np.repeat([text.number for text in texts], [len(text.grams) for text in texts])
        order = np.argsort(grams)
        places = np.searchsorted(self._grams, grams[order])
        self._grams = np.insert(self._grams, places, grams[order])
        self._holders = np.insert(self._holders, places, holders[order])

    def discard(self, texts: Iterable[Text]) -> None:
        """Forget some texts."""
        self._forget([text.number for text in texts])

    def _forget(self, numbers: list[int]) -> None:
        if not numbers:
            return
        for number in numbers:
            text = self._texts.pop(number)
            del self._numbers[text.token_ids.tobytes(), text.is_prompt]
            self._num_tokens -= len(text.token_ids)
        kept = ~np.isin(self._holders, numbers)
        self._grams = self._grams[kept]
        self._holders = self._holders[kept]

    def check_integrity(self) -> None:
        """Assert that the texts and what finds them agree."""
        expected = [
            (int(gram), number) for number, text in self._texts.items() for gram in text.grams
        ]
        found = zip(self._grams.tolist(), self._holders.tolist(), strict=True)
        assert sorted(expected) == sorted(found)
        assert np.all(self._grams[1:] >= self._grams[:-1])
        assert self._num_tokens == sum(len(text.token_ids) for text in self._texts.values())
        assert self._num_tokens <= self._max_tokens
        assert set(self._numbers.values()) == set(self._texts)
