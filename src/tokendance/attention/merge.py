"""Merging attention over disjoint sets of keys by log-sum-exp (LSE).

Softmax over a union of key sets follows from the softmax over each set and the (natural)
logarithm of its denominator: weights exp(lse_i - lse) with lse = log(sum(exp(lse_i))). It is
exact, given the same keys and values (FlashAttention, arXiv 2205.14135, section 3.1).
"""

import torch
from torch import Tensor


def merge_rows(
    output: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor, rows: Tensor
) -> None:
    """Merge the result of some rows over more keys into the result so far, in place.

    Args:
        output: float32 (KVH, G, T, D), the result so far.
        lse: float32 (KVH, G, T), its natural log-sum-exp.
        partial: (KVH, G, R, D), the values of these keys, weighted by their softmax.
        partial_lse: float32 (KVH, G, R), natural.
        rows: int64 (R,), distinct rows of T.
    """
    old_lse = lse[:, :, rows]
    new_lse = torch.logaddexp(old_lse, partial_lse)
    keep = (old_lse - new_lse).exp_().unsqueeze(-1)
    add = (partial_lse - new_lse).exp_().unsqueeze(-1)
    output[:, :, rows] = output[:, :, rows].mul(keep).addcmul_(partial.float(), add)
    lse[:, :, rows] = new_lse
