"""Tokens that a request has had before, for penalties; and biases of tokens that may not come."""

from collections.abc import Sequence

import numpy as np

from tokendance.executor.step import FloatArray, IntArray, Penalties
from tokendance.params import SamplingParams
from tokendance.rounds.segments import TokenIds

Bias = tuple[IntArray, FloatArray]


class SeenTokens:
    """Tokens of a request's prompt and answer, which it counts as the answer grows."""

    def __init__(self, params: SamplingParams, prompt: TokenIds) -> None:
        self._params = params
        repeated = prompt if params.repetition_penalty != 1 else prompt[:0]
        self._prompt = np.unique(repeated).astype(np.int64)
        self._begin()

    def _begin(self) -> None:
        self._num_counted = 0  # of the answer
        # Each token once, and how often the answer has it; there is room behind those that are in.
        self._tokens, self._counts = self._prompt, np.zeros(len(self._prompt), np.float32)
        self._places = {token: place for place, token in enumerate(self._prompt.tolist())}

    @classmethod
    def of(cls, params: SamplingParams, prompt: TokenIds) -> "SeenTokens | None":
        """Those of a request; None if it has no penalties, or its tokens are given."""
        has_any = params.repetition_penalty != 1 or params.presence_penalty != 0
        has_any = has_any or params.frequency_penalty != 0
        return cls(params, prompt) if has_any and params.forced_tokens is None else None

    def penalties(self, generated: Sequence[int]) -> Penalties:
        """Penalties of the token after an answer so far, which has grown or begun anew."""
        if len(generated) < self._num_counted:
            self._begin()
        for token in generated[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._grow()
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_counted = len(generated)
        size = len(self._places)
        return Penalties(
            self._tokens[:size],  # what is in it does not change, and counts do
            self._counts[:size].copy(),
            self._params.repetition_penalty,
            self._params.presence_penalty,
            self._params.frequency_penalty,
        )

    def _grow(self) -> None:
        """Make room for as many tokens again, in other memory."""
        more = max(64, len(self._tokens))
        self._tokens = np.concatenate([self._tokens, np.zeros(more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])


def with_bias(bias: Bias | None, tokens: IntArray, value: float) -> Bias:
    """Biases, and one value for some more tokens."""
    more = tokens, np.full(len(tokens), value, np.float32)
    if bias is None:
        return more
    return np.concatenate([bias[0], more[0]]), np.concatenate([bias[1], more[1]])
