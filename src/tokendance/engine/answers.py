"""How an answer grows and ends."""

from collections.abc import Callable, Sequence

from tokendance.engine.request import Request
from tokendance.engine.stops import text_up_to_stop

Decode = Callable[[Sequence[int]], str]


def add_token(request: Request, token: int, decode: Decode) -> str | None:
    """Add a token to a request's answer; return why it is done, if it is."""
    params = request.params
    if request.max_new_tokens == 0:
        return "length"
    if params.forced_tokens is None:
        # A constrained answer ends where its grammar does.
        goes_on = params.ignore_eos and request.constraint is None
        ends = () if goes_on else request.stop_ids
        if token in ends or token in params.stop_token_ids:
            request.end_token = token
            return "stop"
    request.generated.append(token)
    if params.stop and params.forced_tokens is None:
        text = text_up_to_stop(
            request.generated,
            params.stop,
            decode,
            num_free=params.min_tokens,
            include=params.include_stop,
        )
        if text is not None:
            request.text = text
            request.stopped_by_text = True
            return "stop"
    return "length" if len(request.generated) >= request.max_new_tokens else None


def text_of(request: Request, decode: Decode) -> str:
    """The text of an answer that no stop text has ended."""
    answer = list(request.generated)
    if request.params.include_stop and request.end_token is not None:
        answer.append(request.end_token)
    return decode(answer)
