"""Makes a mirror of a vLLM request: its prompt becomes its own tokens."""

import hashlib
import secrets
from typing import Any

import numpy as np

from tokendance.collector.known import NO_SLOT
from tokendance.integrations.vllm.rounds import Member


def rewrite(request: Any, member: Member, *, max_model_len: int, tokens_per_hash: int) -> None:
    """Leave a request the tokens that it computes itself. It must not have been scheduled yet.

    Args:
        request: `vllm.v1.request.Request`.
        member: what it is in its round.
        max_model_len: bounds prompt and answer, as vLLM's own check would if it knew the whole
            prompt.
        tokens_per_hash: of vLLM's prefix cache.
    """
    own = [request.prompt_token_ids[position] for position in member.own.tolist()]
    request.prompt_token_ids = own
    request._all_token_ids[:] = own
    request.num_prompt_tokens = len(own)
    request.max_tokens = min(request.max_tokens, max_model_len - len(member.token_ids))
    if request._block_hasher is None:
        return
    first_read = int(np.argmax(member.reads != NO_SLOT))
    request.block_hashes = request.block_hashes[: first_read // tokens_per_hash]
    request._block_hasher = _Nonce(tokens_per_hash)
    request.update_block_hashes()


class _Nonce:
    """A hasher of blocks whose hashes nobody else has."""

    def __init__(self, tokens_per_hash: int) -> None:
        self._nonce = secrets.token_bytes(32)
        self._tokens_per_hash = tokens_per_hash

    def __call__(self, request: Any) -> list[bytes]:
        first, last = len(request.block_hashes), request.num_tokens // self._tokens_per_hash
        return [
            hashlib.sha256(self._nonce + index.to_bytes(8, "little")).digest()
            for index in range(first, last)
        ]
