"""Stop texts: where an answer ends that a text ends."""

from collections.abc import Callable, Sequence

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
