"""What prefix caching alone would compute for the same prompts: counted, not run."""

from collections.abc import Sequence

from tokendance.rounds.segments import ChainHash, PrefixHashes, TokenIds, make_salt

_SALT = make_salt("estimate")


class PrefixEstimate:
    """Counts the prompt tokens that an engine with prefix caching would compute.

    It finds beginnings as the engine does, never forgets one (but for `max_pages`), and lets
    prompts of one round share theirs at once: the best that prefix caching can do.
    """

    def __init__(self, page_size: int = 16, *, max_pages: int | None = None) -> None:
        """Make an empty cache.

        Args:
            page_size: tokens of a page.
            max_pages: those that no prompt has held for longest are forgotten beyond so many.
        """
        self._page_size = page_size
        self._max_pages = max_pages
        self._num_tokens: dict[ChainHash, int] = {}  # of each known page

    def add_round(self, prompts: Sequence[tuple[TokenIds, Sequence[int]]]) -> int:
        """Play a round; each prompt comes with its answer's token ids. Return tokens computed."""
        num_computed = 0
        texts = [PrefixHashes(token_ids, _SALT) for token_ids, _ in prompts]
        for text in texts:
            num_known = sum(text.match(self._page_size, self._num_tokens.get))
            # The last token's logits are wanted, so it is always computed.
            num_computed += len(text.token_ids) - min(num_known, len(text.token_ids) - 1)
            self._publish(text)
        for text, (_, answer) in zip(texts, prompts, strict=True):
            self._publish(text.extended(answer[:-1]))
        while self._max_pages is not None and len(self._num_tokens) > self._max_pages:
            del self._num_tokens[next(iter(self._num_tokens))]
        return num_computed

    def _publish(self, text: PrefixHashes) -> None:
        length = len(text.token_ids)
        for start in range(0, length, self._page_size):
            stop = min(start + self._page_size, length)
            page = text.of(stop, self._page_size)
            self._num_tokens.pop(page, None)  # the last in order is the last that was used
            self._num_tokens[page] = stop - start
