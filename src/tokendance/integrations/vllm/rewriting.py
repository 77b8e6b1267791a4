"""Makes a mirror of a vLLM request: its prompt becomes its own tokens. And back again."""

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
    _replace_prompt(request, own)
    request.max_tokens = min(request.max_tokens, max_model_len - len(member.token_ids))
    if request._block_hasher is None:
        return
    first_read = int(np.argmax(member.reads != NO_SLOT))
    request.block_hashes = request.block_hashes[: first_read // tokens_per_hash]
    request._block_hasher = _Nonce(tokens_per_hash, request._block_hasher)
    request.update_block_hashes()


def restore(request: Any, member: Member) -> None:
    """Give a mirror all its tokens back: whatever it has said, it is computed as a plain request.

    vLLM must not take any of its KV for computed after that.
    """
    _replace_prompt(request, member.token_ids.tolist())
    request.max_tokens = member.max_new_tokens
    if request._block_hasher is not None:
        request._block_hasher = request._block_hasher.exact
        request.block_hashes = []
        request.update_block_hashes()


def _replace_prompt(request: Any, token_ids: list[int]) -> None:
    request._all_token_ids[: request.num_prompt_tokens] = token_ids
    request.prompt_token_ids = token_ids
    request.num_prompt_tokens = len(token_ids)


class _Nonce:
    """A hasher of blocks whose hashes nobody else has.

    Attributes:
        exact: the hasher that it stands for.
    """

    def __init__(self, tokens_per_hash: int, exact: Any) -> None:
        self.exact = exact
        self._nonce = secrets.token_bytes(32)
        self._tokens_per_hash = tokens_per_hash

    def __call__(self, request: Any) -> list[bytes]:
        first, last = len(request.block_hashes), request.num_tokens // self._tokens_per_hash
        return [
            hashlib.sha256(self._nonce + index.to_bytes(8, "little")).digest()
            for index in range(first, last)
        ]
