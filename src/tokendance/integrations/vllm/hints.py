"""What a client may say of its request, in `vllm_xargs` or `SamplingParams.extra_args`.

    {"round": "debate-7", "round_size": 10, "blocks": [41, 620, 620, 905], "reuse": "exact"}

Nothing has to be said: rounds and blocks are found without it. What cannot be is ignored, never an
error: whoever reads this is vLLM's scheduler, which all requests share. It says nothing of pages.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("vllm.tokendance")

_MAX_NAME = 256  # characters
_MAX_ROUND = 4096  # requests
_MAX_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client says of its request.

    Attributes:
        round: name of its round: requests of a tenant with the same one run together.
        round_size: requests of the round: it starts when they are there, or after a wait.
        blocks: positions (begin, end) of what others read, too, in their order; None: not said.
        exact: it is computed as vLLM does, whatever others read.
    """

    round: str | None = None
    round_size: int | None = None
    blocks: tuple[tuple[int, int], ...] | None = None
    exact: bool = False


def read_hints(extra_args: Mapping[str, Any] | None, num_tokens: int) -> Hints:
    """Read what is said of a request with a prompt of so many tokens.

    What cannot be is left out, and a line in the log says so.
    """
    if not extra_args:
        return Hints()
    name, size = extra_args.get("round"), extra_args.get("round_size")
    reuse, places = extra_args.get("reuse"), extra_args.get("blocks")
    ignored: list[str] = []
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= _MAX_NAME):
        ignored.append(f"round (give a text of 1 to {_MAX_NAME} characters)")
        name = None
    if size is not None and not (_is_int(size) and 1 <= size <= _MAX_ROUND and name is not None):
        ignored.append(f"round_size (give a number from 1 to {_MAX_ROUND}, beside round)")
        size = None
    if reuse not in (None, "exact", "default"):
        ignored.append("reuse (give exact or default)")
    blocks = None
    if places is not None and (blocks := _read_blocks(places, num_tokens)) is None:
        ignored.append("blocks (give positions begin, end, begin, end, ... that ascend)")
    if ignored:
        log.warning("Ignored of vllm_xargs: %s.", "; ".join(ignored))
    return Hints(name, size, blocks, reuse == "exact")


def _read_blocks(places: Any, num_tokens: int) -> tuple[tuple[int, int], ...] | None:
    """Ranges of positions, if that is what they are."""
    if not isinstance(places, list) or len(places) % 2 or len(places) > 2 * _MAX_BLOCKS:
        return None
    last = 0
    for begin, end in zip(places[::2], places[1::2], strict=True):
        if not (_is_int(begin) and _is_int(end) and last <= begin < end <= num_tokens):
            return None
        last = end
    return tuple(zip(places[::2], places[1::2], strict=True))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
