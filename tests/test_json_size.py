"""How a body's objects, fields, lists and values are counted, against a walk over what it holds."""

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.server.json_size import JSONSize

TEXTS = st.text(alphabet='ab"\\{}[]:,\n\u00e9', max_size=12)
DOCUMENTS = st.recursive(
    st.none() | st.integers(0, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=30,
)


def walk(document: Any) -> tuple[int, int, int, int]:
    """Objects, fields, lists and commas of a document."""
    if isinstance(document, dict):
        own = (1, len(document), 0, max(0, len(document) - 1))
        inner = list(document.values())
    elif isinstance(document, list):
        own, inner = (0, 0, 1, max(0, len(document) - 1)), document
    else:
        return 0, 0, 0, 0
    sums = [sum(column) for column in zip(own, *map(walk, inner), strict=True)]
    return sums[0], sums[1], sums[2], sums[3]


@settings(max_examples=examples(300))
@given(
    document=DOCUMENTS,
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_it_counts_what_a_walk_counts(
    document: Any, ascii_only: bool, indent: int | None, cuts: list[int]
) -> None:
    data = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    size = JSONSize()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in itertools.pairwise(edges):
        size.add(data[begin:end])
    objects, fields, lists, commas = walk(document)
    assert size.num_objects == max(objects, fields // 4, lists // 8, commas // 50)


def test_code_in_a_prompt_counts_for_nothing() -> None:
    size = JSONSize()
    size.add(json.dumps({"prompt": '{"a": [1, 2, {}]}' * 10_000}).encode())
    assert size.num_objects == 1
