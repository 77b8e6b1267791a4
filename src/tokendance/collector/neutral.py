"""Neutral owners: who computes what is read by requests that guard their text.

What a request computes behind its own text tells of that text, so a request that guards it computes
nothing for others. What such requests read, and nobody else of the round will compute, is computed
by requests without any text of their own: prompts of shared segments alone, with no answer.

    Ann  (guards)   [who Ann is] [ W ] [ A ][ B ] [task]
    Bob  (guards)   [who Bob is] [ W ] [ A ][ B ] [task]        neutral   [ A ][ B ]
    Cy   (guards)   [who Cy is ]       [ A ][ B ] [task]        neutral   [ W ]

A segment may stand behind others in a neutral prompt only if all who read it have read those
before it: Cy has not read W, so nothing that he reads is computed behind it. `sources.py` holds
every later reader to the same.

Only hashes are looked at.
"""

from collections.abc import Sequence

from tokendance.rounds.segments import SegmentHash


def neutral_runs(requests: Sequence[Sequence[SegmentHash]]) -> list[list[SegmentHash]]:
    """Divide what requests read into neutral prompts; each segment is in one of them.

    Segments with the same readers stand in one prompt if all of these have them in one order. Else
    each is computed by itself.

    Args:
        requests: for each the segments to compute, in its order.
    """
    orders = [list(dict.fromkeys(segments)) for segments in requests]
    readers: dict[SegmentHash, list[int]] = {}
    for index, order in enumerate(orders):
        for segment in order:
            readers.setdefault(segment, []).append(index)
    by_readers: dict[tuple[int, ...], list[SegmentHash]] = {}
    for segment, indices in readers.items():
        by_readers.setdefault(tuple(indices), []).append(segment)
    runs = list(by_readers.values())
    run_of = {segment: number for number, run in enumerate(runs) for segment in run}
    in_one_order = [True] * len(runs)
    for order in orders:
        here: dict[int, list[SegmentHash]] = {}
        for segment in order:
            here.setdefault(run_of[segment], []).append(segment)
        for number, run in here.items():
            in_one_order[number] &= run == runs[number]
    return [
        part
        for run, is_one in zip(runs, in_one_order, strict=True)
        for part in ([run] if is_one else [[segment] for segment in run])
    ]
