"""Discovery: shared text that nobody has marked, found in token ids.

Prompts that arrive together are compared by their grams, all windows of so many tokens. What
several prompts have in a row is cut wherever one of them begins, ends or goes on otherwise:

    prompt 1   [ private ][ A . . . . . . ][ B . . . . ][ private ]
    prompt 2   [ private    ][ B . . . . ][ private ][ A . . . . . . ]
    prompt 3   [ A . . . . . . ][ B . . . . ][ private ]
    shared       A, B, each with the same ids in all of them

`unitigs.py` finds those ranges. Token ids are those of the whole prompt. Near the edge of a shared
text they can differ from prompt to prompt; its segment is then shorter by those tokens, and the
model reads exactly what the client sent.

New prompts are also compared with two kinds of earlier texts (`gram_index.py`):

- Segments found before. A later round finds them again inside its longer prompts, and a prompt
  that comes late finds those of its round.
- Prompts of the last minutes, since agents that are asked one after another are a round, too. Only
  what follows after the prefix that such a prompt has in common with a new one takes part: a
  conversation that goes on finds its own beginning by its prefix, exactly.

What finished requests have said is remembered, too (`note_output`). Shared text is cut where it
ends (`boundaries.py`), and a prompt that comes alone is compared with it: what others have said is
then read as they have computed it. In a round it is not, since there the first agent reads it, in
its place among all that was said, and computes it for all.
"""

import bisect
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.rounds.boundaries import OutputEnds, message_ends, split_range
from tokendance.rounds.gram_index import GramIndex, IndexedText
from tokendance.rounds.grams import GramHasher, Hashes
from tokendance.rounds.segments import (
    EncodedPrompt,
    Salt,
    SegmentHash,
    TokenIds,
    as_token_ids,
    build_prompt_at,
    hash_segment,
)
from tokendance.rounds.unitigs import find_shared

# A prompt is compared with so many earlier prompts, and segments of such, the last used ones.
_MAX_EARLIER_PROMPTS = 256
_MAX_EARLIER_SEGMENTS = 1024
# Shared text is cut where one of so many last outputs ends.
_MAX_OUTPUTS = 1024


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """What counts as shared.

    Attributes:
        gram_size: tokens that are compared at once; shorter shared text is never found.
        min_tokens: shorter shared text is not worth correcting its edges.
        memory_tokens: earlier texts that are kept for comparison, in tokens.
        recent_s: whole prompts are compared for so many seconds after they, or what they had in
            common with others, were last seen; with 0 only those that arrive together.
        special_ids: of the tokenizer. Where one of them stands behind text, a message ends.
    """

    gram_size: int = 16
    min_tokens: int = 16
    memory_tokens: int = 2**17
    recent_s: float = 600.0
    special_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class EarlierPrompt:
    """An earlier prompt that has shared segments of new ones."""

    token_ids: TokenIds
    segments: tuple[tuple[int, int, SegmentHash], ...]  # the positions (begin, end), and the hash


@dataclass(frozen=True, slots=True, eq=False)
class DiscoveryResult:
    """What was found in prompts that arrived together."""

    prompts: list[EncodedPrompt]  # the same in the same order, cut into segments
    earlier: list[EarlierPrompt]  # that have some of the shared segments


@dataclass(frozen=True, slots=True, eq=False)
class _ComparedText:
    """A text that is compared with others, from position `begin` on."""

    token_ids: TokenIds
    grams: Hashes
    begin: int = 0
    indexed: IndexedText | None = None  # an earlier prompt


class Discovery:
    """Finds shared segments in prompts of one salt, and remembers them."""

    def __init__(self, salt: Salt, config: DiscoveryConfig | None = None) -> None:
        self._salt = salt
        self._config = config or DiscoveryConfig()
        self._hasher = GramHasher(self._config.gram_size)
        self._index = GramIndex(self._config.memory_tokens, self._config.recent_s)
        self._output_ends = OutputEnds(_MAX_OUTPUTS)
        self._special_ids = as_token_ids(sorted(self._config.special_ids))
        # Prompts with what was said after them, until prompts are compared again.
        self._finished: deque[tuple[TokenIds, TokenIds]] = deque(maxlen=_MAX_EARLIER_PROMPTS)

    @property
    def num_bytes(self) -> int:
        """Memory that earlier texts take, about."""
        return self._index.num_bytes + self._output_ends.num_bytes

    def note_output(self, prompt: TokenIds, output: TokenIds) -> None:
        """Remember what a finished request has said, from the next comparison on.

        It may be called while another thread compares prompts.

        Args:
            prompt: int32 token ids of one that was compared.
            output: int32 token ids of all that was generated.
        """
        self._finished.append((prompt, output))

    def segment(
        self, prompts: Sequence[TokenIds], now: float, prefix_lengths: Sequence[int] = ()
    ) -> DiscoveryResult:
        """Cut prompts that arrive together into private and shared segments, and remember them.

        Args:
            prompts: int32 token ids of each.
            now: clock time in seconds.
            prefix_lengths: tokens at the beginning of each prompt that are found by its prefix.
                They are not compared: what an agent itself has said, and reads there, would cut
                what it reads of all later.
        """
        self._remember_outputs(now)
        # Several answers to one prompt are no reason to call it shared.
        distinct = {prompt.tobytes(): prompt for prompt in prompts}
        prefixes = dict(zip([p.tobytes() for p in prompts], prefix_lengths, strict=False))
        new = [
            _ComparedText(prompt, self._hasher.hashes(prompt), prefixes.get(key, 0))
            for key, prompt in distinct.items()
        ]
        matching = self._index.lookup(np.concatenate([text.grams for text in new]), now)
        earlier = self._earlier_prompts(matching, new)
        segments = [text for text in matching if not text.is_prompt][-_MAX_EARLIER_SEGMENTS:]
        compared = [
            *new,
            *earlier,
            *(_ComparedText(text.token_ids, text.grams) for text in segments),
        ]
        shared = self._find_shared(compared)
        cut = {
            key: build_prompt_at(prompt, ranges, self._salt)
            for (key, prompt), ranges in zip(distinct.items(), shared, strict=False)
        }
        in_earlier = shared[len(new) : len(new) + len(earlier)]
        found = {
            segment.hash: segment.token_ids
            for prompt in cut.values()
            for _, segment in prompt.shared_segments()
        }
        heard = self._note_heard(earlier, in_earlier)
        self._remember(
            [ids for ids in found.values() if ids.tobytes() not in heard],
            new,
            now,
        )
        return DiscoveryResult(
            [cut[prompt.tobytes()] for prompt in prompts],
            self._with_segments(found.keys(), earlier, in_earlier),
        )

    def _earlier_prompts(
        self, matching: Sequence[IndexedText], new: Sequence[_ComparedText]
    ) -> list[_ComparedText]:
        """Earlier prompts, each from where it differs from all new ones.

        Those that have gone on since are part of what they have become, and leave the index.
        """
        sorted_new = sorted((text.token_ids for text in new), key=np.ndarray.tobytes)
        earlier: list[_ComparedText] = []
        has_gone_on: list[IndexedText] = []
        for text in [text for text in matching if text.is_prompt][-_MAX_EARLIER_PROMPTS:]:
            begin = _common_prefix_length(text.token_ids, sorted_new)
            if begin >= text.num_prompt:
                has_gone_on.append(text)
                continue
            # Whoever comes alone reads what others have said as they have computed it.
            reads_output = len(new) == 1 and not text.is_heard
            end = len(text.token_ids) if reads_output else text.num_prompt
            num_grams = max(0, end - self._config.gram_size + 1)
            earlier.append(_ComparedText(text.token_ids[:end], text.grams[:num_grams], begin, text))
        self._index.discard(has_gone_on)
        return earlier

    def _note_heard(
        self, earlier: Sequence[_ComparedText], shared: Sequence[Sequence[tuple[int, int]]]
    ) -> set[bytes]:
        """Note whose outputs a new prompt has read; return the parts that it has, as bytes.

        From then on the prompt takes their place: it has them with what stands around them, a name
        before and a line break behind, as others will read them.
        """
        heard: set[bytes] = set()
        for text, ranges in zip(earlier, shared, strict=True):
            assert text.indexed is not None
            num_prompt = text.indexed.num_prompt
            said = [(begin, end) for begin, end in ranges if end > num_prompt]
            heard.update(text.token_ids[begin:end].tobytes() for begin, end in said)
            num_heard = sum(end - max(begin, num_prompt) for begin, end in said)
            # Another may have said a few of the same words.
            if said and 2 * num_heard >= len(text.token_ids) - num_prompt:
                text.indexed.is_heard = True
        return heard

    def _find_shared(self, texts: Sequence[_ComparedText]) -> list[list[tuple[int, int]]]:
        """Ranges (begin, end) of positions of each text that another one has, too, in blocks."""
        config = self._config
        shared = find_shared(
            [text.grams[text.begin :] for text in texts], config.gram_size, config.min_tokens
        )
        return [
            self._split(text, [(text.begin + begin, text.begin + end) for begin, end in ranges])
            for text, ranges in zip(texts, shared, strict=True)
        ]

    def _split(
        self, text: _ComparedText, ranges: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Cut ranges of a text where messages and outputs end."""
        if not ranges:
            return []
        config = self._config
        messages = message_ends(text.token_ids, self._special_ids)
        outputs = self._output_ends.found_in(text.grams, config.gram_size)
        return [
            block
            for begin, end in ranges
            for block in split_range(
                begin, end, messages, outputs, config.gram_size, config.min_tokens
            )
        ]

    def _with_segments(
        self,
        wanted: Collection[SegmentHash],
        earlier: Sequence[_ComparedText],
        shared: Sequence[Sequence[tuple[int, int]]],
    ) -> list[EarlierPrompt]:
        """Earlier prompts that have some of these segments; `shared` are their ranges."""
        recalled: list[EarlierPrompt] = []
        for text, ranges in zip(earlier, shared, strict=True):
            hashed = (
                (begin, end, hash_segment(text.token_ids[begin:end], self._salt))
                for begin, end in ranges
            )
            if segments := tuple(segment for segment in hashed if segment[2] in wanted):
                recalled.append(EarlierPrompt(text.token_ids, segments))
        return recalled

    def _remember_outputs(self, now: float) -> None:
        """Put what was said behind the prompts that are remembered.

        The KV of the last token need not be there, so it is left out.
        """
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        for _, output in finished:
            self._output_ends.note(self._hasher.hashes(output))
        if self._config.recent_s <= 0:
            return
        known = self._index.discard_prompts(
            {prompt.tobytes() for prompt, output in finished if len(output) > 1}
        )
        texts = [
            (np.concatenate([prompt, output[:-1]]), len(prompt))
            for prompt, output in finished
            if len(output) > 1 and prompt.tobytes() in known
        ]
        self._index.add(
            [(text, self._hasher.hashes(text)) for text, _ in texts],
            now,
            is_prompt=True,
            num_prompt=[length for _, length in texts],
        )

    def _remember(
        self, segments: Iterable[TokenIds], new: Sequence[_ComparedText], now: float
    ) -> None:
        hashed = [(token_ids, self._hasher.hashes(token_ids)) for token_ids in segments]
        self._index.add(hashed, now, is_prompt=False)
        if self._config.recent_s > 0:
            prompts = [(text.token_ids, text.grams) for text in new]
            self._index.add(prompts, now, is_prompt=True)

    def check_integrity(self) -> None:
        """Assert that the index of earlier texts is consistent, and within its bounds."""
        self._index.check_integrity()


def _common_prefix_length(text: TokenIds, prompts: Sequence[TokenIds]) -> int:
    """Length of the longest prefix that a text has in common with any of some prompts.

    As the prompts are sorted by their bytes, that is with one of the two between which the text
    would stand.
    """
    index = bisect.bisect(prompts, text.tobytes(), key=np.ndarray.tobytes)
    longest = 0
    for prompt in prompts[max(0, index - 1) : index + 1]:
        length = min(len(text), len(prompt))
        differing = np.flatnonzero(text[:length] != prompt[:length])
        longest = max(longest, int(differing[0]) if len(differing) else length)
    return longest
