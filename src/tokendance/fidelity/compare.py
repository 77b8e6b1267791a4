"""Comparing what two models, or one model over two kinds of KV, say of the same tokens."""

from torch import Tensor


def compare_logprobs(expected: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two models' distributions of the same tokens.

    Args:
        expected: float32 (tokens, vocabulary), log-probabilities.
        other: likewise, of the same tokens.

    Returns:
        The KL divergence of `other` from `expected` in nats (tokens,), and 1 where both put the
        same token first, else 0 (tokens,).
    """
    kl = (expected.exp() * (expected - other)).sum(dim=-1)
    return kl, (expected.argmax(dim=-1) == other.argmax(dim=-1)).float()
