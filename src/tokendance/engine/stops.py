"""Stop texts: where an answer ends that a text ends."""

from collections.abc import Callable, Sequence

# Tokens more than a stop text can have, for characters that are cut and tokens without text.
_MARGIN = 8


def text_up_to_stop(
    generated: Sequence[int],
    stops: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    *,
    num_free: int = 0,
    include: bool = False,
) -> str | None:
    """The text of an answer before the stop text that its last token has ended, if it has.

    Args:
        generated: the answer so far; what it was before had no stop text in it.
        stops: texts that end it.
        decode: token ids to text.
        num_free: of so many first tokens no stop text ends the answer.
        include: whether the stop text is part of it.
    """
    if len(generated) <= num_free:
        return None
    # A token has a byte or more, special ones aside, so the last few hold it. Where the first of
    # them begins inside a character, some decoders read none of the bytes that follow.
    longest = max(len(stop.encode(errors="surrogatepass")) for stop in stops) + _MARGIN
    end = decode(generated[-longest:])
    if "\ufffd" not in end and not any(stop in end for stop in stops):
        return None
    text = decode(generated)
    begin = len(decode(generated[:num_free])) if num_free else 0
    found = find_stop(text, stops, begin)
    return None if found is None else text[: found[1] if include else found[0]]


def find_stop(text: str, stops: Sequence[str], begin: int) -> tuple[int, int] | None:
    """Where the first stop text begins and ends that ends behind `begin`; None if none does."""
    places = [(text.find(stop, max(0, begin - len(stop) + 1)), len(stop)) for stop in stops]
    found = [(at, at + length) for at, length in places if at >= 0]
    return min(found, default=None)
