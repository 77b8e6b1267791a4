"""An oracle: what a cache could reuse that knew all that was said before. Plain and slow."""

from collections.abc import Sequence
from dataclasses import dataclass, field

GRAM = 16
Gram = tuple[int, ...]


def grams(token_ids: Sequence[int]) -> list[Gram]:
    """All windows of `GRAM` tokens."""
    return [tuple(token_ids[first : first + GRAM]) for first in range(len(token_ids) - GRAM + 1)]


@dataclass
class Oracle:
    """Knows all prompts of one tenant, in the order in which they came.

    A token can be reused if it lies in a window of `GRAM` tokens that stands, in whatever place, in
    an earlier prompt, or in the asker's own last prompt and the answer to it. The last token of a
    prompt never can, since its logits are wanted.
    """

    _known: set[Gram] = field(default_factory=set)

    def reusable(self, prompt: Sequence[int], own: Sequence[int]) -> int:
        """Count the tokens of a prompt that can be reused, then remember it.

        Args:
            prompt: token ids.
            own: those of the asker's last prompt and the answer to it.
        """
        known = self._known.union(grams(own))
        found = [False] * len(prompt)
        for first, gram in enumerate(grams(prompt)):
            if gram in known:
                found[first : first + GRAM] = [True] * GRAM
        self._known.update(grams(prompt))
        return sum(found[:-1])


@dataclass(frozen=True)
class Asked:
    """One request, as an engine had it.

    Attributes:
        prompt: its token ids.
        answer: likewise.
        reused: tokens of the prompt that were not computed.
    """

    prompt: list[int]
    answer: list[int]
    reused: int


def reusable(asked: Sequence[Sequence[Asked]]) -> list[int]:
    """What the oracle could reuse in each round."""
    oracle = Oracle()
    before: list[list[int]] = []
    found: list[int] = []
    for one_round in asked:
        total = 0
        for request in one_round:
            # One's own last prompt begins as this one does, system prompt and all.
            own = max(
                reversed(before), key=lambda one: common_beginning(one, request.prompt), default=[]
            )
            total += oracle.reusable(request.prompt, own)
        before += [request.prompt + request.answer for request in one_round]
        found.append(total)
    return found


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
