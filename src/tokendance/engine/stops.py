"""Where an answer ends: at a token, at a text, or at its greatest length."""

from collections.abc import Callable, Sequence

from tokendance.engine.request import Request

# Tokens more than a stop text can have, for characters that are cut and tokens without text.
_MARGIN = 8


def text_up_to_stop(
    generated: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str | None:
    """The text of an answer before the stop text that its last token has ended, if it has.

    Args:
        generated: the answer so far; what it was before had no stop text in it.
        stops: texts that end it.
        decode: token ids to text.
    """
    # A token has a byte or more, special ones aside, so the last few hold it. Where the first of
    # them begins inside a character, some decoders read none of the bytes that follow.
    longest = max(len(stop.encode(errors="surrogatepass")) for stop in stops) + _MARGIN
    end = decode(generated[-longest:])
    if "\ufffd" not in end and not any(stop in end for stop in stops):
        return None
    text = decode(generated)
    ends = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(ends)] if ends else None


def append(request: Request, token: int, decode: Callable[[Sequence[int]], str]) -> str | None:
    """Add a token to a request's answer; return why it is done, if it is."""
    params = request.params
    if params.forced_tokens is None:
        # A constrained answer ends where its grammar does.
        goes_on = params.ignore_eos and request.constraint is None
        ends = () if goes_on else request.stop_ids
        if token in ends or token in params.stop_token_ids:
            request.end_token = token
            return "stop"
    request.generated.append(token)
    if params.stop and params.forced_tokens is None:
        text = text_up_to_stop(request.generated, params.stop, decode)
        if text is not None:
            request.text = text
            request.stopped_by_text = True
            return "stop"
    return "length" if len(request.generated) >= request.max_new_tokens else None
