"""An index of recent texts by their grams, so that any few tokens in a row find them.

The grams of all texts are kept in one sorted array. Whether a new prompt has anything in common
with thousands of earlier ones is then a binary search for each of its grams, and only the texts
found there have to be compared with it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.rounds.grams import Hashes
from tokendance.rounds.segments import TokenIds

# A token's id twice, in the text and in the dictionary's key; its gram twice, in the text and in
# the sorted array; and the number of the text that the gram is of.
_BYTES_PER_TOKEN = 4 + 4 + 8 + 8 + 8


@dataclass(slots=True, eq=False)
class IndexedText:
    """A text of the index."""

    token_ids: TokenIds
    grams: Hashes
    is_prompt: bool  # or a segment that several prompts shared
    used_s: float  # clock time at which a prompt last had one of its grams
    number: int  # in the order in which texts were added
    num_prompt: int  # its tokens, but for what was said after a prompt
    is_heard: bool = False  # what was said stands in another's prompt, too


class GramIndex:
    """Texts by their grams; the least recently used are evicted first."""

    def __init__(self, max_tokens: int, prompt_ttl_s: float) -> None:
        """Make an index for `max_tokens` in all; prompts go when they are not used for so long."""
        self._max_tokens = max_tokens
        self._prompt_ttl_s = prompt_ttl_s
        self._texts: OrderedDict[int, IndexedText] = OrderedDict()  # least recently used first
        self._number_of: dict[tuple[bytes, bool], int] = {}
        self._next_number = 0
        self._num_tokens = 0
        self._grams = np.zeros(0, np.uint64)  # of all texts, ascending
        self._text_numbers = np.zeros(0, np.int64)  # the number of each gram's text

    @property
    def num_bytes(self) -> int:
        """Memory that the texts and the arrays take, about."""
        return self._num_tokens * _BYTES_PER_TOKEN

    def lookup(self, grams: Hashes, now: float) -> list[IndexedText]:
        """Find the texts that have any of these grams, and mark them as used at `now`, in seconds.

        The least recently used come first.
        """
        self.discard(
            text
            for text in self._texts.values()
            if text.is_prompt and now - text.used_s > self._prompt_ttl_s
        )
        # A gram may stand in a text a thousand times, so its range of the array is marked by its
        # two ends and not entry by entry.
        grams = np.unique(grams)
        edges = np.zeros(len(self._grams) + 1, np.int64)
        np.add.at(edges, np.searchsorted(self._grams, grams, "left"), 1)
        np.add.at(edges, np.searchsorted(self._grams, grams, "right"), -1)
        matching = set(np.unique(self._text_numbers[np.cumsum(edges)[:-1] > 0]).tolist())
        texts = [text for number, text in self._texts.items() if number in matching]
        for text in texts:
            self._touch(text, now)
        return texts

    def add(
        self,
        texts: Sequence[tuple[TokenIds, Hashes]],
        now: float,
        *,
        is_prompt: bool,
        num_prompt: Sequence[int] | None = None,
    ) -> None:
        """Add texts that came together, and evict others to make room for them.

        A text that is in the index already is only marked as used. One that has no gram, or is
        longer than the whole index may be, is left out. `num_prompt` says how many tokens of each
        are the prompt, where others were said after it; all if left out.
        """
        added: list[IndexedText] = []
        lengths = [len(ids) for ids, _ in texts] if num_prompt is None else num_prompt
        for (token_ids, grams), length in zip(texts, lengths, strict=True):
            key = (token_ids.tobytes(), is_prompt)
            if key in self._number_of:
                self._touch(self._texts[self._number_of[key]], now)
            elif len(grams) > 0 and len(token_ids) <= self._max_tokens:
                # Copied, since a segment is a view of its prompt and would keep all of it.
                text = IndexedText(
                    token_ids.copy(), grams, is_prompt, now, self._next_number, length
                )
                self._texts[text.number] = text
                self._number_of[key] = text.number
                self._num_tokens += len(token_ids)
                self._next_number += 1
                added.append(text)
        self.discard(self._least_recently_used(self._num_tokens - self._max_tokens))
        self._insert_grams([text for text in added if text.number in self._texts])

    def _touch(self, text: IndexedText, now: float) -> None:
        text.used_s = now
        self._texts.move_to_end(text.number)

    def _least_recently_used(self, num_tokens: int) -> Iterator[IndexedText]:
        """The texts that were used longest ago, with at least so many tokens in all."""
        for text in self._texts.values():
            if num_tokens <= 0:
                break
            yield text
            num_tokens -= len(text.token_ids)

    def _insert_grams(self, texts: Sequence[IndexedText]) -> None:
        """Insert the grams of all texts at once, since each insertion copies the whole array."""
        if not texts:
            return
        grams = np.concatenate([text.grams for text in texts])
        text_numbers = np.repeat(
            [text.number for text in texts], [len(text.grams) for text in texts]
        )
        order = np.argsort(grams)
        indices = np.searchsorted(self._grams, grams[order])
        self._grams = np.insert(self._grams, indices, grams[order])
        self._text_numbers = np.insert(self._text_numbers, indices, text_numbers[order])

    def discard(self, texts: Iterable[IndexedText]) -> None:
        """Remove some texts of the index."""
        gone = list(texts)
        if not gone:
            return
        for text in gone:
            del self._texts[text.number]
            del self._number_of[text.token_ids.tobytes(), text.is_prompt]
            self._num_tokens -= len(text.token_ids)
        kept = ~np.isin(self._text_numbers, [text.number for text in gone])
        self._grams = self._grams[kept]
        self._text_numbers = self._text_numbers[kept]

    def discard_prompts(self, keys: Iterable[bytes]) -> set[bytes]:
        """Remove the prompts of these bytes; return those that were there."""
        numbers = {key: self._number_of.get((key, True)) for key in keys}
        found = {key: number for key, number in numbers.items() if number is not None}
        self.discard(self._texts[number] for number in found.values())
        return set(found)

    def check_integrity(self) -> None:
        """Assert that texts and arrays agree, and that the index is within its bounds."""
        expected = [
            (int(gram), number) for number, text in self._texts.items() for gram in text.grams
        ]
        entries = zip(self._grams.tolist(), self._text_numbers.tolist(), strict=True)
        assert sorted(expected) == sorted(entries)
        assert np.all(self._grams[1:] >= self._grams[:-1])
        assert self._num_tokens == sum(len(text.token_ids) for text in self._texts.values())
        assert self._num_tokens <= self._max_tokens
        assert set(self._number_of.values()) == set(self._texts)
