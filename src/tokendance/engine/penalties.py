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
        self._prompt = np.unique(prompt).tolist() if params.repetition_penalty != 1 else []
        self._counts: dict[int, int] = {}
        self._num_counted = 0

    @classmethod
    def of(cls, params: SamplingParams, prompt: TokenIds) -> "SeenTokens | None":
        """Those of a request; None if it has no penalties, or its tokens are given."""
        has_any = params.repetition_penalty != 1 or params.presence_penalty != 0
        has_any = has_any or params.frequency_penalty != 0
        return cls(params, prompt) if has_any and params.forced_tokens is None else None

    def penalties(self, generated: Sequence[int]) -> Penalties:
        """Penalties of the token after an answer so far, which has grown or begun anew."""
        if len(generated) < self._num_counted or not self._counts:
            self._counts = dict.fromkeys(self._prompt, 0)
            self._num_counted = 0
        for token in generated[self._num_counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._num_counted = len(generated)
        return Penalties(
            np.fromiter(self._counts, np.int64, len(self._counts)),
            np.fromiter(self._counts.values(), np.float32, len(self._counts)),
            self._params.repetition_penalty,
            self._params.presence_penalty,
            self._params.frequency_penalty,
        )


def with_bias(bias: Bias | None, tokens: IntArray, value: float) -> Bias:
    """Biases, and one value for some more tokens."""
    more = tokens, np.full(len(tokens), value, np.float32)
    if bias is None:
        return more
    return np.concatenate([bias[0], more[0]]), np.concatenate([bias[1], more[1]])
