"""How blocks are cut where a prompt has not room for all of them."""

from collections.abc import Sequence


def cut_evenly(lengths: Sequence[int], room: int, least: int) -> list[int]:
    """Divide room among blocks: the longest give way, down to one length for all of them.

        lengths  ########  ##  ######  #####        21 tokens, and room for 14
        kept     ####      ##  ####    ####

    Where the blocks that are cut would not keep `least` tokens each, the longest are left out
    altogether, of equal ones the last.

    Args:
        lengths: of the blocks, in tokens.
        room: tokens that there is room for.
        least: tokens of a block that are worth keeping, if it has more.

    Returns:
        For each block how many tokens it may have: all of its own, at least `least`, or none.
    """
    shortest_first = sorted(range(len(lengths)), key=lambda index: lengths[index])
    num_least = sum(min(length, least) for length in lengths)
    while num_least > room and shortest_first:
        num_least -= min(lengths[shortest_first.pop()], least)
    kept = [0] * len(lengths)
    for num_before, index in enumerate(shortest_first):
        kept[index] = min(lengths[index], room // (len(shortest_first) - num_before))
        room -= kept[index]
    return kept
