"""What rounds inside vLLM have saved, from the scheduler to whoever shows it."""

from dataclasses import dataclass


@dataclass(slots=True)
class Figures:
    """Counts since the last figures, and what is so at the moment.

    Attributes:
        rounds: that began with several requests that share something.
        mirrors: requests that began to read KV of others.
        prompt_tokens: of requests that could be in a round, and began.
        computed_tokens: of these, computed.
        reused_tokens: of these, read where others have computed them.
        corrected_tokens: of the computed, shared and computed afresh.
        shared_pages: vLLM's blocks that several requests read at the moment.
        resident_pages: blocks that such requests have at the moment.
        dense_pages: blocks that they would have if each had all its KV for itself.
        retained_pages: blocks that are kept for later rounds.
        page_bytes: of a block.
    """

    rounds: int = 0
    mirrors: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    corrected_tokens: int = 0
    shared_pages: int = 0
    resident_pages: int = 0
    dense_pages: int = 0
    retained_pages: int = 0
    page_bytes: int = 0
