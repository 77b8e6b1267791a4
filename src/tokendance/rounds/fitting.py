"""How blocks are cut where a prompt has not room for all of them."""

from collections.abc import Sequence

from tokendance.rounds.prompts import Part, shared

# Ends a block that was cut.
CUT_MARK = " […]\n"
# Tokens that are worth keeping of a block, before the mark.
_LEAST_KEPT = 8


def cut_blocks(
    blocks: Sequence[Part], excess: int, mark: Sequence[int]
) -> tuple[tuple[Part, ...], int]:
    """Make blocks shorter by `excess` tokens, or leave all of them out if they have no more.

    Args:
        blocks: shared, of token ids.
        excess: tokens, 1 or more.
        mark: token ids of `CUT_MARK`.

    Returns:
        The blocks that are left, and how many tokens all of them have lost.
    """
    contents = [block_ids(block) for block in blocks]
    lengths = [len(content) for content in contents]
    room = max(0, sum(lengths) - excess)
    left: list[Part] = []
    num_lost = 0
    for block, content, length in zip(
        blocks, contents, cut_evenly(lengths, room, len(mark) + _LEAST_KEPT), strict=True
    ):
        if length == len(content):
            left.append(block)
            continue
        num_kept = max(0, length - len(mark))
        num_lost += len(content) - num_kept
        if num_kept:
            left.append(shared([*content[:num_kept], *mark]))
    return tuple(left), num_lost


def block_ids(block: Part) -> tuple[int, ...]:
    """Token ids of a block that is made of nothing else."""
    assert isinstance(block.content, tuple)
    return block.content


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
