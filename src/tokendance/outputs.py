"""What comes back: an answer per agent, and the figures of a round."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokendance.errors import StoreError, TokenDanceError
from tokendance.rounds.segments import TokenIds

# Called with a round's phase ("prefill" or "decode") and the number of agents done with it.
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place of an answer, or of a prompt."""

    logprob: float  # of the token that was chosen, or that stands there
    top: tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first
    rank: int = 0  # of the token among all, from 1; of prompts only


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One agent's answer.

    Attributes:
        agent: whose.
        text: the answer, without the stop text; empty after an error.
        token_ids: generated, without the token that ended the answer; where a stop text ended
            it, the tokens that spell it are among them.
        stopped_by_text: whether a stop text ended the answer.
        finish_reason: "stop", "length" or "error".
        error: why there is no answer, with reason "error".
        prompt_token_ids: int32, what the model read; empty after an error.
        prompt_tokens: its length.
        computed_tokens: prompt tokens that the request computed.
        reused_tokens: prompt tokens whose KV was there already; the rest of `prompt_tokens`.
        approximate_tokens: those whose KV was computed in another context: reused ones, and with
            `owners` those that it computed behind a co-owner's text.
        corrected_tokens: of the computed ones, shared tokens that had KV and were computed afresh.
        logprobs: float32 (vocabulary,) for each generated token, if asked for.
        dropped_tokens: of what was said before, in a session: those that the prompt had to leave
            out this time, because it would not have fitted the model's context.
        prompt_logprobs: of each token of the prompt but the first, if asked for.
    """

    agent: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    error: TokenDanceError | None
    prompt_token_ids: TokenIds
    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    corrected_tokens: int
    stopped_by_text: bool = False
    logprobs: tuple[Tensor, ...] = ()
    dropped_tokens: int = 0
    approximate_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class KVBytes:
    """KV memory of a round.

    Attributes:
        dense: bytes of one full cache per agent, prompt and answer, without rounding to pages.
        resident: most bytes of distinct pages that the agents held at one time, room reserved
            for answers included.
    """

    dense: int
    resident: int


@dataclass(frozen=True, slots=True)
class RoundStats:
    """Figures of a round; tokens and bytes over all its agents, failed ones left out.

    Attributes:
        agents: with an answer.
        prompt_tokens: of their prompts.
        computed_tokens: prompt tokens computed, also by requests without an answer, which compute
            what agents of the round reuse.
        reused_tokens: prompt tokens whose KV was there already when the agent began.
        corrected_tokens: of the computed ones, shared tokens computed afresh by mirrors.
        generated_tokens: of the answers.
        prefill_s: seconds from the round's start to the last agent's first token.
        decode_s: seconds from there to the end of the round.
        kv_bytes: see there.
        dropped_tokens: see `Output`.
    """

    agents: int
    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    corrected_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    kv_bytes: KVBytes
    dropped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RoundResult:
    """Answers of a round, in the order of its prompts, and its figures."""

    outputs: tuple[Output, ...]
    stats: RoundStats

    def raise_for_errors(self) -> None:
        """Raise the first agent's error, if any agent has one."""
        for output in self.outputs:
            if output.error is not None:
                raise output.error


class NotStoredError(StoreError):
    """A round of a session was answered and heard, and is not on disk.

    Attributes:
        result: of the round.
    """

    def __init__(self, reason: str, result: RoundResult) -> None:
        """Tell why, and hand the round over all the same."""
        super().__init__(f"{reason} The round was heard, and goes to disk with the next.")
        self.result = result
